"""What a manifest promises, and what of it an output folder does not hold."""

from __future__ import annotations

from nirvana_deploy.base.artifact import files_under
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import DENSE_ONNX, ENGINES, MANIFEST
from nirvana_deploy.output.owned import names_of_a_run
from nirvana_deploy.output.run import Run

_HOLDERS = {DENSE_ONNX.partition("/")[0], ENGINES}
"""Folders that are not written whole: what else lies in them is nobody's business."""


def incomplete(run: Run) -> str | None:
    """What is missing of what the command was to make, as a sentence; None if nothing is.

    A run whose manifest does not say that it is complete was killed, has failed, or is not finished yet.
    """
    stages = run.manifest["stages"]
    strangers = [name for name, record in stages.items() if record.get("run") != run.manifest.get("run")]
    if strangers:
        return f"{run.out} holds records of more than one run: stage {strangers[0]} is of another."
    made = [name for name in stages if name != stage.REPORT]
    if not made:
        return f"{run.out} is incomplete: no stage is finished."
    if run.manifest.get("complete") is not True:
        return f"{run.out} is incomplete: the last stage is {made[-1]}."
    if not run.has(stage.ONNX):
        return f"{run.out} was never exported: it has a checkpoint and no ONNX model."
    return None


def unlisted(run: Run) -> list[str]:
    """Files under the names of a run that its manifest does not list, relative to the folder."""
    listed, out = run.listed(), run.out
    ours = {*names_of_a_run(out), *run.manifest.get("makes", ()), DENSE_ONNX} - _HOLDERS - {MANIFEST}
    found = {
        file.relative_to(out).as_posix()
        for name in ours
        if (out / name).exists()
        for file in files_under(out / name)
        if file.suffix != ".log"  # which a build that failed leaves
    }
    return sorted(found.difference(listed))
