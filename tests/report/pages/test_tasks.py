"""The table of tasks: dense beside pruned, with standard errors."""

from __future__ import annotations

from typing import Any

from nirvana_deploy.report.pages.tasks import explain, headers, rows

RECORD: dict[str, Any] = {
    "limit": 500,
    "files": {"hellaswag": {"metric": "acc_norm"}, "piqa": {"metric": "acc"}},
    "variants": {
        "dense": {
            "hellaswag": {"acc,none": 0.35, "acc_stderr,none": 0.02, "acc_norm,none": 0.4},
            "piqa": {"acc,none": 0.65, "acc_stderr,none": 0.021},
        },
        "pruned": {"hellaswag": {"acc,none": 0.3, "acc_norm,none": 0.31, "acc_norm_stderr,none": 0.01}},
    },
    "means": {
        "baseline": "dense",
        "tasks": ["hellaswag", "piqa"],
        "variants": {
            "dense": {
                "mean": 0.525,
                "standard_error": 0.014,
                "difference": None,
                "difference_standard_error": None,
            },
            "pruned": {
                "mean": 0.45,
                "standard_error": None,
                "difference": -0.075,
                "difference_standard_error": 0.004,
            },
        },
    },
}


def test_errors_stand_beside_their_values_and_the_mean_is_last() -> None:
    assert explain(RECORD).endswith("0-shot, the first 500 examples of each, with standard errors")
    assert headers(RECORD) == ("task", "metric", "dense", "pruned")
    assert rows(RECORD) == (
        ("hellaswag", "acc_norm", "0.400", "0.310 ± 0.010"),  # its own metric first
        ("hellaswag", "acc", "0.350 ± 0.020", "0.300"),
        ("piqa", "acc", "0.650 ± 0.021", "—"),
        ("mean of 2", "acc_norm or acc", "0.525 ± 0.014", "0.450"),
        ("mean of 2", "minus dense, paired", "—", "\N{MINUS SIGN}0.075 ± 0.004"),
    )


def test_names_alone_have_no_mean() -> None:
    record = {"limit": None, "variants": {"dense": {"mmlu": {"acc,none": 0.25, "exact_match,strict": 0.5}}}}
    assert rows(record) == (("mmlu", "acc", "0.250"), ("mmlu", "exact_match,strict", "0.500"))
    assert "0-shot" not in explain(record) and "first" not in explain(record)
