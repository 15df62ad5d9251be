"""``nirvana-deploy evaluate OUT``: measure quality again, on any text."""

from __future__ import annotations

from pathlib import Path

import click

from .common import TerminalProgress, echo_json, echo_table, json_option, threads_option


@click.command("evaluate")
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--eval-text",
    type=click.Path(path_type=Path),
    default=None,
    help="Text to measure on. [the windows that calibration held out]",
)
@threads_option
@json_option
def evaluate(out: Path, eval_text: Path | None, threads: int | None, as_json: bool) -> None:
    """Measure perplexity, and KL against dense, of the ONNX models in OUT; rewrites the report.

    \b
    Example:
      nirvana-deploy evaluate smollm2-s0.4 --eval-text handbook.txt
    """
    from nirvana_deploy import pipeline
    from nirvana_deploy.measure.table import format_number

    result = pipeline.evaluate_folder(out, eval_text=eval_text, threads=threads, progress=TerminalProgress())
    if as_json:
        echo_json(result)
        return
    rows = []
    for name, found in result["variants"].items():
        kl = (
            "-"
            if found["kl_vs_dense"] is None
            else f"{found['kl_vs_dense']:.3f} ± {found['kl_standard_error'] or 0:.3f}"
        )
        rows.append([name, format_number(found["perplexity"]), kl, f"{found['tokens']:,}"])
    echo_table(["Variant", "Perplexity", "KL vs dense, nats", "Tokens"], rows, title=result["source"])
