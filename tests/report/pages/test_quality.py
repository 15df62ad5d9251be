"""Quality by kind of text; what the models write, as they wrote it."""

from __future__ import annotations

from typing import Any

from nirvana_deploy.output.records import Records
from nirvana_deploy.report.findings import gaps
from nirvana_deploy.report.page import markdown_lines
from nirvana_deploy.report.pages.quality import answers, kinds


def records(result: dict[str, Any] | None, name: str = "answers") -> Records:
    return Records({"stages": {name: {"result": result}}}, None, None)


def test_a_row_per_prompt_and_a_column_per_variant() -> None:
    written = {"dense": ["\n  4 | <b>", "x"], "pruned": ["", "\x00\ty"]}
    found = answers(records({"new_tokens": 24, "prompts": ["2 + 2", "a"], "variants": written}))
    assert found is not None
    assert found.headers == ("Prompt", "dense", "pruned")
    assert found.rows == (
        ("2 + 2", "\n  4 | <b>", "(nothing)"),
        ("a", "x", "\N{REPLACEMENT CHARACTER}\ty"),
    )
    assert found.rates == (("dense", "\N{EM DASH}", "0 of 2"), ("pruned", "0 of 2", "0 of 2"))


def test_a_model_that_was_not_asked_has_a_reason_and_no_table() -> None:
    found = answers(records({"new_tokens": 24, "prompts": [], "variants": {"dense": []}, "skipped": "Why."}))
    assert found is not None and found.says == "Not asked: Why." and found.rows == ()
    assert answers(records(None)) is None


def test_a_markdown_cell_keeps_its_lines_and_is_escaped() -> None:
    assert markdown_lines("a | b\n<i>  c") == "a \\| b<br>\\<i\\> c"


def test_kinds_that_the_model_was_not_calibrated_on_say_so() -> None:
    def part(perplexity: float, kl: float | None, error: float | None = None) -> dict[str, Any]:
        return {"perplexity": perplexity, "kl_vs_dense": kl, "kl_standard_error": error, "tokens": 1020}

    variants = {
        "dense": {"parts": {"pydoc": part(10, 0.0, 0.0), "code": part(4, None)}},
        "pruned": {"parts": {"pydoc": part(15, 0.5, 0.02), "code": part(8, 0.7)}},
    }
    result = {"source": "pydoc", "variants": variants, "calibrated": {"pydoc": True, "code": False}}
    found = kinds(records(result, "quality"))
    assert found is not None and found.headers == ("Text", "Measure", "dense", "pruned")
    assert found.rows == (
        ("pydoc: 1,020 tokens", "perplexity", "10.0", "15.0 (1.50\N{MULTIPLICATION SIGN})"),
        ("", "KL to dense", "0", "0.500 \N{PLUS-MINUS SIGN} 0.020"),
        (
            "code, not calibrated on: 1,020 tokens",
            "perplexity",
            "4.00",
            "8.00 (2.00\N{MULTIPLICATION SIGN})",
        ),
        ("", "KL to dense", "\N{EM DASH}", "0.700"),
    )
    assert kinds(records({"source": "pydoc", "variants": {}}, "quality")) is None


def test_quality_without_speed_is_no_gap() -> None:
    """As with --no-benchmark: the page shows quality by kind of text."""
    told = [gap.what for gap in gaps(records({"source": "pydoc", "variants": {}}, "quality"))]
    assert any("Speed and memory" in one for one in told) and not any("perplexity" in one for one in told)
    assert any("perplexity" in gap.what for gap in gaps(Records(None, None, None)))
