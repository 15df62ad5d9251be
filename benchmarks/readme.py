"""Refresh the tables of README.md and benchmarks/README.md, and the picture.

    nirvana-deploy prune-export smollm2 --sparsity 0.4 --quantize int8,w4 --quantize-head --out FOLDER
    python benchmarks/recipes.py smollm2 --calib A --texts DIR --out benchmarks/results/recipes.jsonl
    python benchmarks/quality.py smollm2 --calib A --eval-text B --out benchmarks/results/quality.jsonl
    python benchmarks/selection.py smollm2 --calib A --eval-text B \\
        --quality benchmarks/results/quality.jsonl --out benchmarks/results/selection.jsonl
    python benchmarks/readme.py FOLDER

With a folder, copies the records of the main job to benchmarks/results/ and, if Chromium is installed, takes
the picture of its report. Then rewrites the tables between the pages' markers from the records. A test checks
that the pages show what the records say.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from budget_families import table as budgets_table  # the scripts beside this one
from consumers import section as where_it_runs
from engine_promises import is_twin
from frontier import section as frontier_section
from frontier import verdict as frontier_verdict
from intervals import section as intervals_section
from job_cost import table as job_cost_table
from newcomer import section as newcomer_section
from peers import section as peers_section
from quality import read_rows, reconstruction_table, table
from quantization import table as quantization_table
from recipes import read_rows as read_recipes
from recipes import table as recipes_table
from recover import table as recovery_table
from recover_bounds import on_paper
from recover_speed import section as recovery_speed
from runtimes import section as runtimes_section
from scaling import tables as scaling_tables
from selection import table as selection_table
from serve import section as serve_section
from speculative import section as speculative_section

from nirvana_deploy.report.pages import tasks as tasks_page
from nirvana_deploy.report.table import summary_table
from nirvana_deploy.verify.cases import PROMPTS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RECORD = RESULTS / "smollm2-s0.4.benchmark.json"
SECOND_RECORD = RESULTS / "gemma3-270m-s0.2.benchmark.json"
PICTURE = RESULTS / "report.png"
QUALITY = RESULTS / "quality.jsonl"
SELECTION = RESULTS / "selection.jsonl"
CONSUMERS = RESULTS / "consumers.json"
QUANTIZATION = RESULTS / "quantization.json"
EXPORT = RESULTS / "export.json"
JOB_COST = RESULTS / "job-cost.json"
DECODE_SPEED = RESULTS / "decode-speed.json"
ENGINES = RESULTS / "engines.json"
RECIPES = RESULTS / "recipes.jsonl"
SEARCH = RESULTS / "search-smollm2-best.json"
BUDGETS = RESULTS / "budgets-families.json"
ZERO_SHOT = RESULTS / "zero-shot.json"
RECOVERY = RESULTS / "recover.jsonl"
RECOVERY_SPEED = RESULTS / "recover-speed.jsonl"
SERVE = RESULTS / "serve.json"
SPECULATIVE = RESULTS / "speculative.json"
INTERVALS = RESULTS / "intervals.json"
PEERS = RESULTS / "peers.json"
PEERS_PICTURE = PEERS.with_suffix(".png")
RUNTIMES = RESULTS / "runtimes.json"
NEWCOMER = RESULTS / "newcomer.json"
_INTERVALS_COMMAND = (
    "python benchmarks/intervals.py --folder OUT/onnx --out benchmarks/results/intervals.json"
)
_NEWCOMER_COMMAND = "python benchmarks/newcomer.py --model FOLDER --json benchmarks/results/newcomer.json"
_PEERS_COMMAND = (
    "python benchmarks/peers.py OUT --work DIR --llama-cpp NPM --json benchmarks/results/peers.json "
    "--picture benchmarks/results/peers.png"
)
_RUNTIMES_COMMAND = (
    "python benchmarks/runtimes.py OUT --work DIR --llama-cpp NPM --json benchmarks/results/runtimes.json"
)


HEADLINES = (
    "Weight file",
    "Decode, per token",
    "Prefill, prompt of 128",
    "Peak memory (RSS)",
    "Perplexity",
    "KL to dense, nats per token",
)
HEADLINE_VARIANTS = ("dense", "pruned", "pruned-w4")


def headline_section(benchmark: dict[str, Any]) -> str:
    """The front page's table of a benchmark.json: six measures of three models, and the machine under it."""
    table = summary_table(benchmark)
    rows = {row[0]: dict(zip(table.headers, row, strict=True)) for row in table.rows}
    chosen = [(name, *(rows[name][variant] for variant in HEADLINE_VARIANTS)) for name in HEADLINES]
    load, where = benchmark["workload"], benchmark["environment"]
    note = (
        f"SmolLM2-135M, batch {load['batch_size']}, {where['threads']} threads of {where['cpu']}, "
        f"onnxruntime {where['onnxruntime']}; quality on {benchmark['evaluation']['source']}."
    )
    return "\n".join([*_markdown(("", *HEADLINE_VARIANTS), chosen), "", note])


def measured_section(benchmark: dict[str, Any]) -> str:
    """The whole table of a benchmark.json, with the bound and the machine under it."""
    table = summary_table(benchmark)
    lines = _markdown(table.headers, table.rows)
    gain, where, load = benchmark["comparisons"][0], benchmark["environment"], benchmark["workload"]
    decode, prefill = f"{gain['bound_tpot_speedup']:.2f}", f"{gain['bound_prefill_speedup']:.2f}"
    notes = [
        f"Of the pruned model, decode reaches {gain['tpot_share_of_bound']:.0%} of the speed-up that the",
        f"removed bytes alone give ({decode} times), prefill {gain['prefill_share_of_bound']:.0%} of what",
        f"the removed operations give at equal efficiency ({prefill} times).",
        f"Batch {load['batch_size']}, {load['prompt_tokens']} prompt tokens,",
        f"{load['new_tokens']} new ones, {load['repeats']} alternating rounds; {where['threads']} threads of",
        f"{where['cpu']}, onnxruntime {where['onnxruntime']}.",
        f"Quality on {benchmark['evaluation']['source']}.",
    ]
    return "\n".join([*lines, "", *notes])


def _markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, all columns but the first aligned right."""
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return [f"| {' | '.join(row)} |" for row in (headers, rule, *rows)]


def quality_section() -> str:
    """The tables of quality.jsonl and selection.jsonl."""
    rows = read_rows(QUALITY)
    parts = (table(rows), reconstruction_table(rows), selection_table([*rows, *read_rows(SELECTION)]))
    return "\n\n".join(part for part in parts if part)


def consumers_section() -> str:
    """The table of consumers.json."""
    return where_it_runs(json.loads(CONSUMERS.read_text()))


def recipes_section() -> str:
    """The table of recipes.jsonl."""
    return recipes_table(read_recipes(RECIPES))


def verdict_section() -> str:
    """What the search on record says about pruning beside quantization, for the front page."""
    return frontier_verdict(json.loads(SEARCH.read_text()))


def zero_shot_section() -> str:
    """The table of zero-shot.json, the record of ``evaluate --tasks``."""
    record = json.loads(ZERO_SHOT.read_text())
    shown = _markdown(tasks_page.headers(record), tasks_page.rows(record))
    return "\n".join([*shown, "", f"{tasks_page.explain(record)}."])


def recovery_section() -> str:
    """The table of recover.jsonl, and what the models of its rows write."""
    rows = read_recipes(RECOVERY)
    lines = [recovery_table(rows), ""]
    for prompt in PROMPTS:
        lines.append(f"*{prompt}*")
        for row in _longest(rows):
            name = f"{row['sparsity']:g}, {row['course']['tokens']:,} tokens" if row["method"] else "the cut"
            name = name if row["method"] else f"{row['sparsity']:g}, {name}"
            text = " ".join(row["answers"][prompt].split()) or "(nothing)"
            lines.append(f"- {name}: {text}")
        lines.append("")
    loads = ", ".join(f"{row['environment']['load_average_1min']:.1f}" for row in rows)
    return "\n".join([*lines, f"One thread; load of the machine {loads}."])


def _longest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each sparsity the cut, and the recovery that read most."""
    found: dict[tuple[float, bool], dict[str, Any]] = {}
    for row in rows:
        key = row["sparsity"], bool(row["method"])
        tokens = [one.get("course", {}).get("tokens", 0) for one in (row, found.get(key, row))]
        if key not in found or tokens[0] > tokens[1]:
            found[key] = row
    return list(found.values())


def quantization_section() -> str:
    """The tables of quantization.json and decode-speed.json."""
    parts = ((QUANTIZATION, quantization_table), (DECODE_SPEED, decode_section))
    return "\n\n".join(write(json.loads(file.read_text())) for file, write in parts if file.is_file())


def export_section() -> str:
    """The table of export.json: what an export costs, and what its graph is worth."""
    lines = [
        "| exporter | CPU seconds | peak MB | nodes | prefill ms | decode ms a token |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    record = json.loads(EXPORT.read_text())
    for name, row in record["exporters"].items():
        cost, latency = row["cost"], row["latency"]
        cells = [
            f"{cost['cpu_s']:.1f}",
            f"{cost['peak_rss_bytes'] / 1e6:.0f}",
            str(row["graph"]["nodes"]),
            f"{latency['prefill_ms']['p50']:.0f}",
            f"{latency['tpot_ms']['p50']:.1f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    promises = (one for one in record["promises"] if one["promise"].startswith("decode"))
    found = [
        f"{one['promise']}: {one['found']:.2f} ({'kept' if one['kept'] else 'BROKEN'}, {one['allowed']:g})"
        for one in promises
    ]
    return "\n".join([*lines, "", f"By the median round, promise in brackets: {'; '.join(found)}."])


def engines_section() -> str:
    """The table of engines.json: what engines take and what building them costs, beside dense."""
    runs = json.loads(ENGINES.read_text())["runs"]
    lines = [
        "| model, engine | weights MB | kernel texts | engine MB | weights | engine | CPU | memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for model, run in runs.items():
        beside = {(one["form"], one["variant"]): one for one in run["comparisons"]}
        for build in run["builds"]:
            if not is_twin(build["variant"]):
                variant = build["variant"]
                name = f"{model.removesuffix(f', {variant} alone')}, {variant}, {build['form']}"
                cells = _engine_cells(build, beside.get((build["form"], variant)))
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_engine_notes(runs)])


def _engine_cells(build: dict[str, Any], beside: dict[str, Any] | None) -> list[str]:
    """One build; the last four cells are shares of the dense one, or its own cost where it is alone."""
    if "stopped" in build:
        return [f"stopped after {build['process_s']:.0f} s: {build['stopped']}", *[""] * 6]
    sizes = [build["weights_bytes"] / 1e6, build["programs"]["kernel_sources"], build["engine_bytes"] / 1e6]
    cells = [f"{size:.0f}" for size in sizes]
    if beside is None:
        return [*cells, "", "", f"{build['cpu_s']:.1f} s", f"{build['peak_own_bytes'] / 1e9:.2f} GB"]
    shares = []
    for name, digits in (("engine", 3), ("cpu", 2), ("memory", 2)):
        at_best = f" ({beside['bound'][name]:.{digits}f})" if "bound" in beside else ""
        shares.append(f"{beside[f'{name}_ratio']:.{digits}f}{at_best}")
    return [*cells, f"{beside['weights_ratio']:.3f}", *shares]


def _engine_notes(runs: dict[str, Any]) -> list[str]:
    """What the table says about the promises, in words."""
    built = [build for run in runs.values() for build in run["builds"] if "programs" in build]
    texts, stored, zipped = (
        sum(build["programs"][key] for build in built) for key in ("kernel_sources", "bytes", "zlib_bytes")
    )
    notes = [
        "In brackets: the best that a model of these weights can reach, by a line through narrow models of "
        f"as many layers. A kernel text takes {stored / texts / 1e6:.2f} MB; all of them compress "
        f"{stored / zipped:.0f} times, if an engine has to travel.",
    ]
    notes += [
        f"The build that was stopped has {build['onnx_bytes'] / 1e9:.1f} GB of weights."
        for run in runs.values()
        for build in run["builds"]
        if "stopped" in build
    ]
    for model, run in runs.items():
        pairs = [one for one in run["comparisons"] if one["variant"] == "pruned"]
        if not pairs:
            continue
        told = [
            f"{word} {_counted(pairs, 'kept', name)}"
            + (f" ({_counted(pairs, 'can_be_kept', name)} at best)" if "can_be_kept" in pairs[0] else "")
            for name, word in (("engine", "bytes"), ("cpu", "CPU time"), ("memory", "memory"))
        ]
        off = max(abs(one["size_deviation"]) for one in pairs)
        count = f"{len(pairs)} pruned engines" if len(pairs) > 1 else "one pruned engine"
        notes.append(f"{model}, {count}: promises kept of {', '.join(told)}; bytes at most {off:.1%} off.")
        notes += [f"{_needed(one)} {_spread(run['builds'], one)}" for one in pairs[:1] if "bound" in one]
    return notes


def _counted(pairs: list[dict[str, Any]], what: str, name: str) -> str:
    found = [one[what][name] for one in pairs if what in one]
    return f"{sum(found)} of {len(found)}"


def _spread(builds: list[dict[str, Any]], one: dict[str, Any]) -> str:
    """How far the CPU seconds of two builds spread, and what is left of their ratio without the system's."""
    pair = {b["variant"]: b for b in builds if b["form"] == one["form"]}
    names = ("dense", one["variant"])
    taken = {name: pair[name]["cpu_s_samples"] for name in names}
    ranges = (f"{name} {min(taken[name]):.1f} to {max(taken[name]):.1f}" for name in names)
    told = f"CPU seconds of {len(taken['dense'])} builds each: {', '.join(ranges)}."
    if not all("system_s_samples" in pair[name] for name in names):
        return told
    own = {
        name: median(c - s for c, s in zip(taken[name], pair[name]["system_s_samples"], strict=True))
        for name in names
    }
    return (
        f"{told} Most of the difference is the system's time for memory and files; the builder's own is "
        f"{own['dense']:.1f} and {own[one['variant']]:.1f} s, "
        f"{own[one['variant']] / own['dense']:.2f} of dense."
    )


def _needed(one: dict[str, Any]) -> str:
    """From which size on a promise could be kept, by the line of one form."""
    words = [
        f"{word} from {needed / 1e9:.1f} GB"
        for name, word in (("engine", "bytes"), ("cpu", "CPU time"), ("memory", "memory"))
        if (needed := one["weights_needed_bytes"][name]) is not None
    ]
    never = " of dense weights on" if words else "never"
    return f"With its layers, in {one['form']}, these could be kept: {', '.join(words)}{never}."


def decode_section(record: dict[str, Any]) -> str:
    """Decode of quantized models in onnxruntime-genai as a table, then what it promises."""
    dense, where = record["variants"]["dense"]["p50_ms"], record["environment"]
    lines = [
        "| decode in onnxruntime-genai | weights MB | ms a token, median | times dense |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| {name} | {v['weights_bytes'] / 1e6:.0f} | {v['p50_ms']:.2f} | {dense / v['p50_ms']:.2f} |"
        for name, v in record["variants"].items()
    ]
    promises = [
        f"{row['fast']} against {row['slow']}: {row['speedup']:.2f} times (p10 to p90 of rounds "
        f"{row['speedup_p10_p90'][0]:.2f} to {row['speedup_p10_p90'][1]:.2f}; promised {row['promise']:g})"
        for row in record["promises"]
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"Quantized models have their head quantized too; {record['rounds']} rounds, "
            f"{where['threads']} threads of {where['cpu']}. {'. '.join(promises)}.",
        ]
    )


def peers_with_picture(record: dict[str, Any]) -> str:
    """The section of peers.py below its picture, if that was drawn."""
    seen = f"![Decode time across, KL to dense up](results/{PEERS_PICTURE.name})\n\n"
    return (seen if PEERS_PICTURE.is_file() else "") + peers_section(record)


def _recorded(file: Path, section: Callable[[dict[str, Any]], str], command: str) -> str:
    """What a record says; how it is made, where it was not made yet."""
    if not file.is_file():
        return f"Not on record yet: `{command}`"
    return section(json.loads(file.read_text()))


def sections_by_page() -> dict[Path, dict[str, str]]:
    """Page -> marker -> what stands between its marks."""
    benchmark = json.loads(RECORD.read_text())
    return {
        ROOT / "README.md": {"headline": headline_section(benchmark), "worth": verdict_section()},
        ROOT / "benchmarks" / "README.md": {
            "measured": measured_section(benchmark),
            "second": measured_section(json.loads(SECOND_RECORD.read_text())),
            "consumers": consumers_section(),
            "recipes": recipes_section(),
            "zero-shot": zero_shot_section(),
            "recovery": recovery_section(),
            "recovery-speed": recovery_speed(read_recipes(RECOVERY_SPEED)),
            "recovery-bounds": on_paper("8b"),
            "frontier": frontier_section(json.loads(SEARCH.read_text())),
            "budgets": budgets_table(json.loads(BUDGETS.read_text())),
            "quality": quality_section(),
            "quantization": quantization_section(),
            "export": export_section(),
            "scaling": scaling_tables(),
            "job-cost": job_cost_table(json.loads(JOB_COST.read_text())["jobs"]),
            "newcomer": _recorded(NEWCOMER, newcomer_section, _NEWCOMER_COMMAND),
            "engines": engines_section(),
            "intervals": _recorded(INTERVALS, intervals_section, _INTERVALS_COMMAND),
            "peers": _recorded(PEERS, peers_with_picture, _PEERS_COMMAND),
            "runtimes": _recorded(RUNTIMES, runtimes_section, _RUNTIMES_COMMAND),
            "serve": serve_section(json.loads(SERVE.read_text())),
            "speculative": speculative_section(json.loads(SPECULATIVE.read_text())),
        },
    }


def with_section(page: str, name: str, section: str) -> str:
    """The page with the text between the markers of ``name`` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{section}\n{end}{after}"


def take_picture(page: Path) -> None:
    """The first screen of the report, by headless Chromium; says so where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("No Chromium found: the picture is left as it was.")
        return
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                "--window-size=1200,1440",
                f"--screenshot={PICTURE}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
        )


def main() -> None:
    """Read the folder named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", help="output folder of the main job")
    out = parser.parse_args().out
    if out is not None:
        RESULTS.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(json.loads((out / "benchmark.json").read_text()), indent=1) + "\n")
        take_picture(out / "report.html")
    for page, sections in sections_by_page().items():
        text = page.read_text(encoding="utf-8")
        for name, section in sections.items():
            text = with_section(text, name, section)
        page.write_text(text, encoding="utf-8")
    print(measured_section(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()
