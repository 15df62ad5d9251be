"""``nirvana-deploy verify OUT``: check an output folder at any time."""

from __future__ import annotations

from pathlib import Path

import click

from .common import TerminalProgress, echo_json, echo_table, json_option, runtime_option, threads_option


@click.command("verify")
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@runtime_option
@threads_option
@json_option
def verify(out: Path, runtime: str | None, threads: int | None, as_json: bool) -> None:
    """Check OUT: sha256 of its files, then logits and greedy tokens of its ONNX against its checkpoint.

    The dense baseline is checked too where the model it came from is still in place. Exit code 3 when
    something differs. --runtime also runs the models there, and compares it with ONNX Runtime on the CPU: an
    engine at the smallest, optimal and largest sizes of its profiles.

    \b
    Example:
      nirvana-deploy verify smollm2-s0.4
      nirvana-deploy verify smollm2-s0.4 --runtime tensorrt-rtx
    """
    from nirvana_deploy import pipeline

    result = pipeline.verify_folder(out, threads=threads, runtime=runtime, progress=TerminalProgress())
    if as_json:
        reports = {name: report.to_json() for name, report in result.reports.items()}
        compared = {name: report.to_json() for name, report in result.compared.items()}
        echo_json({"damaged": result.damaged, **reports, **({"compared": compared} if compared else {})})
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
        rows.append(["sha256 of all files", f"{len(result.damaged)} differ", "0", _word(not result.damaged)])
        echo_table(["Check", "Found", "Allowed", "Verdict"], rows)
    result.require_passed()


def _word(passed: bool) -> str:
    return "passed" if passed else "FAILED"
