"""report.md and report.html from the records of an output folder.

The HTML is self-contained: style and figures inside, no script, and a content policy that lets a browser load
nothing else. The Markdown has the same numbers as tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from markupsafe import Markup

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.units import format_bytes, format_number, format_seconds, format_share
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import REPORT_HTML, REPORT_MARKDOWN
from nirvana_deploy.output.record_kinds import (
    KernelRecord,
    Selected,
    SelectionRecord,
    TasksRecord,
    VerifiedRecord,
)
from nirvana_deploy.output.records import (
    LayerWidth,
    Records,
    layer_widths,
    listed_files,
    read_records,
)
from nirvana_deploy.report import figures, findings
from nirvana_deploy.report.compare.runtimes import runtimes_section
from nirvana_deploy.report.facts import details
from nirvana_deploy.report.page import PlacedFigure, environment, markdown_environment
from nirvana_deploy.report.pages import (
    curves,
    deployed,
    layers,
    ntk,
    quality,
    recovery,
    speculative,
    tasks,
    trade,
    workloads,
)
from nirvana_deploy.report.roofline import bounds, operators
from nirvana_deploy.report.snippets import snippets
from nirvana_deploy.report.table import (
    ABSENT,
    Table,
    baseline_of,
    challengers_of,
    gain,
    median_of,
    summary_table,
    text_bar,
)
from nirvana_deploy.report.tiles import headline_tiles
from nirvana_deploy.report.verdict import verdict


def _bounds_ms(benchmark: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Variant name -> median of ``metric`` in ms at its bound, if the bound is known."""
    before_ms = median_of(baseline_of(benchmark) or {}, metric)
    found_ms = {}
    for variant in challengers_of(benchmark):
        found = gain(benchmark, variant, "prefill" if metric == "prefill_ms" else "tpot")
        if found and found.bound and before_ms:
            found_ms[str(variant["name"])] = before_ms / found.bound
    return found_ms


def _latency_figures(benchmark: Mapping[str, Any], baseline: str | None) -> list[PlacedFigure]:
    prompt = (benchmark.get("workload") or {}).get("prompt_tokens")
    # the time of every single token shows the spread; the mean per round is what the headline uses
    every_token = all(v.get("itl_ms") for v in benchmark["variants"])
    titles = {
        "itl_ms" if every_token else "tpot_ms": "Decode, time of each token",
        "prefill_ms": f"Prefill, time for {prompt:,} tokens" if prompt else "Prefill, time for the prompt",
    }
    placed = []
    for metric, title in titles.items():
        variants = [v for v in benchmark["variants"] if v.get(metric)]
        if not variants:
            continue
        bounds_ms = _bounds_ms(benchmark, metric)
        svg = figures.latency_figure(
            variants, metric=metric, title=title, baseline=baseline, bound_ms=bounds_ms
        )
        count = max(len(v[metric].get("samples") or ()) for v in variants)
        drawn = figures.MAX_DOTS
        thinned = f" ({drawn} of them drawn)" if count > drawn else ""
        caption = f"{count:,} samples per variant, one dot each{thinned}; the line is the median."
        if bounds_ms:
            why = "operations" if metric == "prefill_ms" else "bytes read"
            caption += f" Dotted: where the median would be if time followed the {why} alone."
        placed.append(PlacedFigure(Markup(svg), caption))
    return placed


def _benchmark_figures(records: Records) -> list[PlacedFigure]:
    benchmark = records.benchmark or {}
    variants = benchmark.get("variants") or []
    if not variants:
        return []
    reference = baseline_of(benchmark)
    baseline = str(reference["name"]) if reference else None
    placed = _latency_figures(benchmark, baseline)
    placed.append(
        PlacedFigure(
            Markup(figures.memory_figure(variants, baseline=baseline)),
            "Each variant ran in a process of its own, so its peak is its own. "
            "KV cache: bytes that one token adds.",
        )
    )
    explained = (bounds.roofline_figure(benchmark), operators.time_figure(benchmark))
    return [*placed, *filter(None, explained)]


def _deciding_figure(records: Records) -> PlacedFigure | None:
    svg = trade.trade_figure(records, verdict(records).recommended)
    return None if svg is None else PlacedFigure(svg, trade.caption(records))


def _figures_of(records: Records, out: Path) -> list[PlacedFigure]:
    placed = []
    if records.plan:
        svg = layers.kept_width_figure(layer_widths(records.plan))
        caption = "Blue is kept, grey removed. A KV group is one KV head with its query heads."
        placed.append(PlacedFigure(Markup(svg), caption))
        placed += _curves_figures(out, layer_widths(records.plan))
    placed += _recovery_figures(records)
    selection = _selection(records)
    if selection:
        svg = figures.selection_figure(selection)
        caption = "Each candidate was scored, planned and masked; the least KL on held-out text was taken."
        placed.append(PlacedFigure(Markup(svg), caption))
    for losses in deployed.measured_layers(records):
        caption = "Measured on 128 tokens with every other layer in float: where int8 loses, not how much."
        placed.append(PlacedFigure(Markup(layers.sensitivity_figure(losses)), caption))
    return placed + _benchmark_figures(records)


def _curves_figures(out: Path, widths: tuple[LayerWidth, ...]) -> list[PlacedFigure]:
    measured = curves.curves_of(out, widths)
    if measured is None:
        return []
    caption = (
        "Blue bars, logarithmic: what the layer alone is predicted to cost after the best refit. "
        "Orange: the share that the plan keeps. Units of other layers may be dearer, or weigh less."
    )
    return [PlacedFigure(Markup(curves.curves_figure(measured, widths)), caption)]


def _recovery_figures(records: Records) -> list[PlacedFigure]:
    done = recovery.recovery_of(records)
    if done is None:
        return []
    svg = recovery.recovery_figure(done)
    return [PlacedFigure(Markup(svg), recovery.caption(done))]


def _selection(records: Records) -> SelectionRecord | None:
    """The selector's record; None if there was no choice."""
    found = records.result(stage.SELECT, Selected)
    selection = found.get("selection") if found else None
    if selection and selection["winner"] >= len(selection["candidates"]):
        raise NirvanaError(
            f"manifest.json: the winner of stage {stage.SELECT!r} is {selection['winner']}, "
            f"of {len(selection['candidates'])} candidates."
        )
    return selection


def _kernel(records: Records) -> dict[str, Any] | None:
    """Context of the tangent kernel section; None if it wasn't measured."""
    record = records.result(stage.TANGENT_KERNEL, KernelRecord)
    return None if record is None else _section(ntk, record)


def _kernel_figure(records: Records) -> PlacedFigure | None:
    record = records.result(stage.TANGENT_KERNEL, KernelRecord)
    if record is None:
        return None
    caption = "Line: what the removed weights alone take, an identity. Dotted: the most that they can take."
    return PlacedFigure(Markup(figures.kernel_figure(record)), caption)


def _tasks(records: Records) -> dict[str, Any] | None:
    """Context of the section on tasks; None if none was run."""
    record = records.result(stage.TASKS, TasksRecord)
    return None if record is None or not record["variants"] else _section(tasks, record)


def _workloads(records: Records) -> list[dict[str, Any]]:
    """Contexts of the sections on workloads."""
    page = workloads
    return [
        _timed(one, page.title(one), page.explain(one), page.workload_table(one))
        for one in (records.workloads or {}).get("workloads") or ()
    ]


def _sweeps(records: Records) -> list[dict[str, Any]]:
    """Contexts of the sections on sweeps."""
    page = workloads
    return [
        _timed(one, page.sweep_title(one), page.explain_sweep(one), page.sweep_table(one))
        for one in (records.workloads or {}).get("sweeps") or ()
    ]


def _timed(record: Mapping[str, Any], title: str, says: str, table: Table) -> dict[str, Any]:
    return {"title": title, "says": says, "cautions": workloads.cautions(record), "table": table}


def _sweep_figures(records: Records) -> list[PlacedFigure]:
    """A figure for each of :func:`_sweeps`."""
    return [
        PlacedFigure(Markup(workloads.sweep_figure(one)), workloads.CAPTION)
        for one in (records.workloads or {}).get("sweeps") or ()
    ]


def _section(page: ModuleType, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a section says, and its table."""
    return {"says": page.explain(record), "headers": page.headers(record), "rows": page.rows(record)}


def _speculative(records: Records) -> dict[str, Any] | None:
    """Context of the section on the model with its draft; None where there is none."""
    record = records.speculative
    if record is None:
        return None
    says = " ".join(speculative.says(record))
    return {"says": says, "headers": speculative.HEADERS, "rows": speculative.rows(record)}


def _bounds(benchmark: Mapping[str, Any]) -> dict[str, Any] | None:
    """Context of the section on the machine's bounds; None where none was measured."""
    found = bounds.rows(benchmark)
    return {"says": bounds.says(benchmark), "headers": bounds.HEADERS, "rows": found} if found else None


def _stage_figure(records: Records) -> PlacedFigure | None:
    stages = (records.manifest or {}).get("stages") or {}
    seconds = [stage["seconds"] for stage in stages.values() if stage.get("seconds") is not None]
    if not seconds:
        return None
    caption = f"{format_seconds(sum(seconds))} in all, each stage in the order it ran."
    return PlacedFigure(Markup(figures.stage_time_figure(stages)), caption)


def _checks(records: Records) -> tuple[tuple[str, ...], ...]:
    """Rows of the verification table: model, check, value found, tolerance, result."""
    rows = []
    for model, result in (records.result(stage.VERIFY, dict[str, VerifiedRecord]) or {}).items():
        for check in result.get("checks", ()):
            difference, tolerance = (
                ABSENT if value is None else format_number(value, digits=2)
                for value in (check["max_abs_diff"], check["tolerance"])
            )
            verdict = "passed" if check["passed"] else "failed"
            rows.append((model, check["name"], difference, tolerance, verdict))
        for asked in result.get("greedy", ()):
            name = f"{asked['new_tokens']} greedy tokens, {asked['runtime']}"
            if asked.get("not_run"):
                rows.append((model, name, ABSENT, ABSENT, f"not run: {asked['not_run']}"))
                continue
            equal, ties, prompts = asked["equal_prompts"], asked["ties"], asked["prompts"]
            found = f"{equal} equal" + (f", {ties} parted at a tie" if ties else "")
            rows.append((model, name, found, f"{prompts} prompts", "passed" if asked["passed"] else "failed"))
        for text in result.get("text", ()):
            found, texts = f"{text['equal_texts']} equal", f"{text['texts']} texts"
            verdict = f"differs: {text['differs']}" if text["differs"] else "passed"
            rows.append((model, f"tokenizer of {text['runtime']}", found, texts, verdict))
    return tuple(rows)


def _layer_rows(records: Records) -> tuple[tuple[str, ...], ...]:
    """Rows of the width table: layer, KV groups kept, FFN neurons kept, their share and a bar."""
    return tuple(
        (layer.label, f"{len(layer.kept_groups)} of {layer.of_groups}", *_neurons(layer))
        for layer in (layer_widths(records.plan) if records.plan else ())
    )


def _neurons(layer: LayerWidth) -> tuple[str, str, str]:
    if not layer.of_neurons:  # a cross-attention
        return ABSENT, ABSENT, ""
    return (
        f"{layer.kept_neurons:,} of {layer.of_neurons:,}",
        format_share(layer.kept_neurons / layer.of_neurons),
        text_bar(layer.kept_neurons, layer.of_neurons, width=20),
    )


def _stage_rows(records: Records) -> tuple[tuple[str, ...], ...]:
    """Rows of the time table: stage, wall time, CPU time, peak RSS."""
    columns = (("seconds", format_seconds), ("cpu_seconds", format_seconds), ("peak_rss_bytes", format_bytes))
    return tuple(
        (name, *(ABSENT if stage.get(key) is None else write(stage[key]) for key, write in columns))
        for name, stage in ((records.manifest or {}).get("stages") or {}).items()
    )


def report_context(records: Records) -> dict[str, Any]:
    """Return the context of both templates, a function of the records alone."""
    decided = verdict(records)
    return {
        "title": findings.title(records),
        "headline": findings.headline(records),
        "verdict": decided,
        "badge": findings.verification_badge(records),
        "tiles": headline_tiles(records, decided.recommended),
        "cautions": findings.cautions(records),
        "machine": findings.machine_cautions(records),
        "gaps": findings.gaps(records),
        "summary": summary_table(records.benchmark) if records.benchmark else None,
        "runtimes": runtimes_section(records.benchmark or {}),
        "speculative": _speculative(records),
        "workloads": _workloads(records),
        "sweeps": _sweeps(records),
        "bounds": _bounds(records.benchmark or {}),
        "times": operators.section(records.benchmark or {}),
        "quantized_headers": deployed.QUANTIZED_HEADERS,
        "quantized": deployed.quantized_rows(records),
        "engine_headers": deployed.ENGINE_HEADERS,
        "engines": deployed.engine_rows(records),
        "details": details(records),
        "kinds": quality.kinds(records),
        "answers": quality.answers(records),
        "kernel": _kernel(records),
        "tasks": _tasks(records),
        "checks": _checks(records),
        "layers": _layer_rows(records),
        "files": listed_files(records),
        "snippets": snippets(records, decided.recommended),
        "stages": _stage_rows(records),
    }


def render_markdown(context: Mapping[str, Any]) -> str:
    """Render report.md from ``report_context``; every value is escaped for Markdown."""
    return markdown_environment().get_template("report.md.j2").render(context)


def render_html(
    context: Mapping[str, Any],
    placed: list[PlacedFigure],
    *,
    sweep_figures: Sequence[PlacedFigure] = (),
    **others: PlacedFigure | None,
) -> str:
    """report.html from ``report_context`` and its figures; every value is escaped for HTML."""
    template = environment().get_template("report.html.j2")
    return template.render(context, figures=placed, sweep_figures=sweep_figures, **others)


def write_unread(out: Path, problem: NirvanaError) -> None:
    """Write OUT/report.md and OUT/report.html of records that a later version made: no verdict, and why."""
    title = "No verdict: made by a later version of nirvana-deploy"
    context = {"title": title, "problem": problem.message, "hint": problem.hint}
    for name, templates in ((REPORT_MARKDOWN, markdown_environment()), (REPORT_HTML, environment())):
        page = templates.get_template(f"unread{Path(name).suffix}.j2").render(context)
        write_bytes(out / name, page.encode())


def write_report(out: Path, *, progress: Progress = SILENT) -> tuple[Path, Path]:
    """Write OUT/report.md and OUT/report.html from whatever records OUT holds; returns both paths.

    Reads manifest.json, plan.json and benchmark.json; a part whose record is missing is named in the report
    with the command that makes it. Raises NirvanaError when OUT holds none of them or a broken one.
    """
    with progress.task("Writing the report", total=2) as advance:
        records = read_records(out)
        context = report_context(records)
        markdown, page = out / REPORT_MARKDOWN, out / REPORT_HTML
        write_bytes(markdown, render_markdown(context).encode())
        advance(1)
        html = render_html(
            context,
            _figures_of(records, out),
            sweep_figures=_sweep_figures(records),
            decides=_deciding_figure(records),
            stage_figure=_stage_figure(records),
            kernel_figure=_kernel_figure(records),
        )
        write_bytes(page, html.encode())
        advance(1)
    return markdown, page
