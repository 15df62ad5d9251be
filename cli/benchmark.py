"""``nirvana-deploy benchmark PATH...``: models measured against each other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from nirvana_deploy.measure.recipe import Analysis, Traffic, Workload
from nirvana_deploy.runtime.recipe import Place

from .arguments import CONTENDER
from .benchmark_page import show_contest, show_folder, show_workloads
from .common import TerminalProgress, echo_json
from .options import json_option, recipe_options, taken, typed
from .package import show_speculation


@click.command("benchmark")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=CONTENDER)
@recipe_options(Traffic)
@recipe_options(Workload)
@recipe_options(Analysis)
@recipe_options(Place, without=("threads",))
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With several contenders: write the result, raw samples included, into FILE.",
)
@click.option("--force", is_flag=True, help="Replace FILE.")
@json_option
def benchmark(
    paths: tuple[Path, ...],
    runtime: str | None,
    out: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure an output folder again, or time models of any kind against each other.

    One output folder: its models in turn, dense and pruned, and its benchmark.json and report are rewritten.
    With --workload or --sweep, other requests are timed and kept in workloads.json; benchmark.json stays.

    Several paths, or one of another kind: each is a contender, timed against the first one in alternating
    rounds, in its own process. PATH is an output folder (all its models, or OUT:pruned-w4 for one,
    OUT:dense,pruned for some), an ONNX folder, a checkpoint folder, an engine or a GGUF file. Named twice, it
    is an A/A test. All must be of one model, whose vocabulary the prompts are made of. --runtime concerns
    those that it takes. --workload and --sweep time them under these, and FILE holds what workloads.json
    would.

    Exit code 3 when a model failed; the others keep their results.

    A model with its draft, which 'package --speculative' wrote: answers of --new-tokens to twenty prompts
    with 1 to 6 draft tokens and without, in turn; the fastest is kept.

    \b
    Examples:
      nirvana-deploy benchmark smollm2-s0.4 --prompt-tokens 512 --repeats 21
      nirvana-deploy benchmark smollm2-s0.4 --precision 3% --wait-until-idle
      nirvana-deploy benchmark smollm2-s0.4 --workload chat --workload rag
      nirvana-deploy benchmark smollm2-s0.4 --sweep context=128,512,2048
      nirvana-deploy benchmark smollm2-s0.4 --profile
      nirvana-deploy benchmark smollm2-s0.4:dense smollm2-s0.4:pruned-w4 smollm2-q8_0.gguf --out race.json
      nirvana-deploy benchmark smollm2-s0.4:pruned smollm2-q8_0.gguf --workload chat --out chat.json
      nirvana-deploy benchmark smollm2-s0.4/speculative --new-tokens 128
    """
    from nirvana_deploy.output.layout import REPORT_HTML, is_speculative
    from nirvana_deploy.pipeline.contest import benchmark_contenders, is_one_output_folder

    said = typed(click.get_current_context().params)
    traffic = taken(Traffic, options)
    workload, analysis = taken(Workload, options), taken(Analysis, options)
    progress = TerminalProgress()
    if len(paths) == 1 and is_speculative(paths[0]):
        _require_of_draft(said)
        _speculative(paths[0], workload, as_json=as_json)
        return
    if not is_one_output_folder(paths):
        _refuse(said, _OF_ONE_FOLDER, "goes with one output folder, whose report shows it.")
        _require_meant(traffic, said)
        record = benchmark_contenders(
            paths, workload, asked=traffic, runtime=runtime, out=out, force=force, progress=progress
        )
        where = f"Record: {out}" if out is not None else None
        if traffic.workloads or traffic.sweeps:
            show_workloads(record, traffic, where, as_json=as_json)
        else:
            show_contest(record, where, as_json=as_json)
        return
    if out is not None or force:
        raise click.UsageError("--out and --force go with several contenders: a folder keeps its own record.")
    from nirvana_deploy.pipeline.folder import benchmark_folder, benchmark_workloads

    (folder,) = paths
    if traffic.workloads or traffic.sweeps:
        _require_meant(traffic, said)
        result = benchmark_workloads(folder, traffic, workload, runtime=runtime, progress=progress)
        show_workloads(result, traffic, f"Report: {folder / REPORT_HTML}", as_json=as_json)
    else:
        result = benchmark_folder(folder, workload, analysis, runtime=runtime, progress=progress)
        show_folder(result, folder, profiled=analysis.profile, as_json=as_json)


_OF_ONE_REQUEST = ("prompt_tokens", "new_tokens", "batch_size", "repeats")
_ABOUT_ONE_REQUEST = ("precision", "profile", "fresh_ceilings")
_OF_ONE_FOLDER = ("profile", "fresh_ceilings")
_OF_DRAFT = ("paths", "new_tokens", "threads", "as_json")


def _refuse(said: dict[str, Any], names: Iterable[str], why: str) -> None:
    """Raise a usage error for the first of ``names`` that was typed."""
    flags = {one.name: one.opts[0] for one in click.get_current_context().command.params}
    for name in names:
        if name in said:
            raise click.UsageError(f"{flags[name]} {why}")


def _require_of_draft(said: dict[str, Any]) -> None:
    """Raise a usage error for an option that timing a model with its draft has no use for."""
    others = [name for name in said if name not in _OF_DRAFT]
    _refuse(said, others, "is not for a model with its draft, which takes --new-tokens and --threads.")


def _require_meant(traffic: Traffic, said: dict[str, Any]) -> None:
    """Raise a usage error for an option that a workload or a sweep has no use for."""
    if not traffic.workloads and not traffic.sweeps:
        return
    if not traffic.sweeps:
        _refuse(said, _OF_ONE_REQUEST, "says what the file of a workload says; leave it out.")
    _refuse(said, _ABOUT_ONE_REQUEST, "is about one request; with --workload or --sweep, leave it out.")


def _speculative(folder: Path, workload: Workload, *, as_json: bool) -> None:
    from nirvana_deploy.pipeline.alone.packages import benchmark_speculative

    made = benchmark_speculative(
        folder, new_tokens=workload.new_tokens, threads=workload.threads, progress=TerminalProgress()
    )
    if as_json:
        echo_json({"out": str(made.path), **made.record})
        return
    show_speculation(made.record)
