"""``nirvana-deploy verify OUT``: check an output folder at any time."""

from __future__ import annotations

from pathlib import Path

import click

from nirvana_deploy.runtime.recipe import Place

from .arguments import OUTPUT_OR_ONNX
from .common import TerminalProgress, echo_json, echo_table
from .options import json_option, recipe_options


@click.command("verify")
@click.argument("out", type=OUTPUT_OR_ONNX)
@click.option(
    "--checkpoint",
    "model",
    help="What OUT was exported from, when it is an ONNX folder alone: a folder, an alias or a hub id.",
)
@recipe_options(Place)
@json_option
def verify(out: Path, model: str | None, runtime: str | None, threads: int | None, as_json: bool) -> None:
    """Check OUT: sha256 of its files, then logits and greedy tokens of its ONNX against its checkpoint.

    Where OUT is a model with its draft, which 'package --speculative' wrote: whether the greedy answers to
    twenty prompts are the model's own, token for token.

    OUT has to be complete: every stage of the command that made it, records of one run, no file beside them.
    Before that, each ONNX file has to be valid, with its weights inside its folder, and of the checkpoint's
    shape. Quantized models differ from their checkpoint by design ('nirvana-deploy evaluate' says how much):
    of them the linears that run in integer kernels are counted again.

    The dense baseline is checked too where the model it came from is still in place. Exit code 3 when
    something differs. --runtime also runs the models there, and compares it with ONNX Runtime on the CPU: an
    engine at the smallest, optimal and largest sizes of its profiles.

    \b
    Examples:
      nirvana-deploy verify smollm2-s0.4
      nirvana-deploy verify my-onnx --checkpoint smollm2-s0.4/checkpoint
      nirvana-deploy verify smollm2-s0.4 --runtime tensorrt-rtx
      nirvana-deploy verify smollm2-s0.4/speculative
    """
    from nirvana_deploy.output.layout import is_speculative
    from nirvana_deploy.verify import folder as verifying
    from nirvana_deploy.verify.folder_check import CHECKED

    progress, drafted = TerminalProgress(), is_speculative(out)
    if model is not None:
        if runtime is not None:
            raise click.UsageError("--runtime goes with an output folder, --checkpoint with an ONNX folder.")
        result = verifying.verify_onnx_folder(out, model=model, threads=threads, progress=progress)
    else:
        result = verifying.verify_folder(out, threads=threads, runtime=runtime, progress=progress)
    if as_json:
        reports = {name: report.to_json() for name, report in result.reports.items()}
        more = {
            "compared": {name: report.to_json() for name, report in result.compared.items()},
            "quantized": {name: coverage.to_json() for name, coverage in result.quantized.items()},
            "incomplete": result.incomplete,
            "unlisted": result.unlisted,
        }
        told = {name: entries for name, entries in more.items() if entries}
        echo_json({"damaged": result.damaged, **reports, **told})
    else:
        shown = {**result.reports, **{f"{name} in {runtime}": r for name, r in result.compared.items()}}
        rows = [
            [
                f"{name}: {check.name}",
                f"{check.max_abs_diff:.1e}",
                f"{check.tolerance:.1e}",
                _word(check.passed),
            ]
            for name, report in shown.items()
            for check in report.checks
        ]
        for name, report in shown.items():
            for greedy in report.greedy:
                same = greedy.not_run or f"{greedy.equal_prompts + greedy.ties} of {greedy.prompts} equal"
                verdict = "not run" if greedy.not_run else _word(greedy.passed)
                rows.append(
                    [f"{name}: {greedy.runtime}, {greedy.new_tokens} greedy tokens", same, "all", verdict]
                )
            for text in report.text:
                same = f"{text.equal_texts} of {text.texts} texts equal"
                rows.append([f"{name}: tokenizer of {text.runtime}", same, "all", text.differs or "passed"])
        rows += [
            [f"{name}: {CHECKED}", "whole", "whole", "passed"]
            for name in [*result.reports, *result.quantized]
            if not drafted
        ]
        rows += [
            [f"{name}: linears in integer kernels", str(c.found), str(c.promised), _word(not c.missing)]
            for name, c in result.quantized.items()
        ]
        if model is None and not drafted:
            found = f"{len(result.damaged)} differ"
            rows.append(["sha256 of all files", found, "0", _word(not result.damaged)])
            rows.append(
                [
                    "files that the manifest does not list",
                    str(len(result.unlisted)),
                    "0",
                    _word(not result.unlisted),
                ]
            )
            whole = "incomplete" if result.incomplete else "complete"
            rows.append(["what the manifest promises", whole, "complete", _word(not result.incomplete)])
        echo_table(["Check", "Found", "Allowed", "Verdict"], rows)
    result.require_passed()


def _word(passed: bool) -> str:
    return "passed" if passed else "FAILED"
