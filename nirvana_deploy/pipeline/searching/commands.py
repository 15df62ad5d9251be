"""What to type for the point that a search recommends: run it, and make it again or complete its folder."""

from __future__ import annotations

import os
import shlex
from pathlib import Path, PurePath

from nirvana_deploy.export.recipe import Export
from nirvana_deploy.output.layout import CALIBRATION_FILE, RECIPE_FILE
from nirvana_deploy.output.variants import DENSE, variant_named
from nirvana_deploy.pipeline.before import read_files
from nirvana_deploy.pipeline.job import Job
from nirvana_deploy.search.point import Found

_TOOL = "nirvana-deploy"


def commands_of(found: Found, job: Job, out: PurePath) -> list[str]:
    """Commands for where the search began, from where its folder is ``out`` and the job's paths hold."""
    cut = out / found.folder
    run = [_TOOL, "generate", _path(cut / found.variant.folder), "--prompt", "The capital of France is"]
    if found.sparsity:
        recipe = ["--recipe", _path(cut / RECIPE_FILE)]
        made = [[_TOOL, "prune-export", *recipe, "--resume", "--out", _path(cut)]]
    else:
        made = _dense_anew(found, job, cut)
    return [shlex.join(command) for command in (run, *made)]


def commands_inside(found: Found, job: Job, out: Path) -> list[str]:
    """The same for the folder of the search: those that read the job's own paths begin by leaving it."""
    run, *made = commands_of(found, job, PurePath())
    if all(path.is_absolute() for path in read_files(job)):
        return [run, *made]
    try:
        seen, back = os.path.relpath(out), os.path.relpath(Path.cwd(), out)
    except ValueError:  # on another drive
        seen, back = str(out.absolute()), str(Path.cwd())
    leave = shlex.join(["cd", _path(PurePath(back))])
    return [run, *(f"{leave} && {command}" for command in commands_of(found, job, PurePath(seen))[1:])]


def _dense_anew(found: Found, job: Job, cut: PurePath) -> list[list[str]]:
    """Export the dense model and quantize it on the windows of ``cut``: the bytes of the point."""
    asked, usual = job.export, Export()
    given = {"--dtype": (asked.dtype, usual.dtype), "--flavor": (asked.flavor, usual.flavor)}
    options = [
        word for option, (value, default) in given.items() if value != default for word in (option, value)
    ]
    exported = variant_named(DENSE).folder.replace("/", "-")
    made = [[_TOOL, "export", job.model, "--out", exported, *options]]
    if found.scheme:
        windows = ["--calib", _path(cut / CALIBRATION_FILE)]
        head = ["--head"] if job.quantization.quantize_head else []
        quantized = ["--scheme", found.scheme, *windows, *head, "--out", f"{exported}-{found.scheme}"]
        made.append([_TOOL, "quantize", exported, *quantized])
    return made


def _path(path: PurePath) -> str:
    return path.as_posix()
