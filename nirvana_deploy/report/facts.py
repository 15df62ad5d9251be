"""Labelled facts about a result: budget, workload, environment, origin."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nirvana_deploy.base.units import format_bytes, format_share
from nirvana_deploy.output import stage
from nirvana_deploy.output.records import Records
from nirvana_deploy.output.results import Reconstructed
from nirvana_deploy.report.table import format_times

TEACHER_FORCING = "the encoder reads the first half of a window, the decoder predicts the second"
PREFILL = "the encoder and the decoder's first step"
"""What prefill and evaluation mean for an encoder-decoder."""

Facts = tuple[tuple[str, str], ...]
"""Labels and values, in reading order."""


def evaluation_source(records: Records) -> str | None:
    """Source of the evaluation text; None if not recorded."""
    benchmark = records.benchmark or {}
    places = (benchmark.get("evaluation"), records.stage(stage.QUALITY).get("result"))
    return next((str(place["source"]) for place in places if place and place.get("source")), None)


def encoder_decoder(records: Records) -> bool:
    """Whether the plan's layers name their stacks, as those of encoder-decoders do."""
    layers = (records.plan or {}).get("layers") or ()
    return any(layer.get("site") for layer in layers)


def _facts(record: Mapping[str, Any] | None, labels: Mapping[str, str]) -> Facts:
    record = record or {}
    return tuple(
        (label, format_bytes(record[key]) if key.endswith("_bytes") else str(record[key]))
        for key, label in labels.items()
        if record.get(key) is not None
    )


def _spelled(key: str) -> str:
    """Turn a field's name into a label; values in bytes carry their unit."""
    return key.removesuffix("_bytes").replace("_gb_per_s", " GB/s").replace("_", " ")


def _speed_facts(benchmark: Mapping[str, Any]) -> Facts:
    """Where the speed-ups truly are, or their spread over rounds."""
    facts = []
    for comparison in benchmark.get("comparisons") or ():
        spreads, what = [], "p10 to p90"
        for metric, label in (("tpot", "decode"), ("prefill", "prefill")):
            low_high = comparison.get(f"{metric}_speedup_p10_p90")
            if found := comparison.get(f"{metric}_speedup_interval"):
                low_high, what = (found["low"], found["high"]), f"median, {found['confidence']:.1%} sure"
            if low_high:
                spreads.append(f"{label} {format_times(low_high[0])} to {format_times(low_high[1])}")
        if spreads:
            facts.append((f"Speed-up of {comparison['variant']}, {what}", ", ".join(spreads)))
    return tuple(facts)


def _pruning_facts(plan: Mapping[str, Any]) -> Facts:
    budget, calibration = plan.get("budget") or {}, plan.get("calibration") or {}
    facts: list[tuple[str, str]] = []
    if budget:
        rounded = budget.get("removed_neurons_after_rounding", budget["removed_neurons"])
        facts = [
            ("Budget asked", f"{format_share(budget['asked_removed_share'])} of the linear weights"),
            ("Budget met", f"{budget['met_removed_share'] * 100:.3f}%"),
            ("KV groups removed", f"{budget['removed_groups']:,} of {budget['of_groups']:,}"),
            ("FFN neurons removed", f"{rounded:,} of {budget['of_neurons']:,}"),
            ("Neurons before rounding", f"{budget['removed_neurons']:,}"),
        ]
    windows = (calibration.get("num_sequences"), calibration.get("seq_len"))
    names = {
        "saliency": "Saliency",
        "gamma": "Gamma",
        "allocation": "Allocation",
        "round_to": "Widths rounded to",
    }
    drawn = {"source": "Calibration text", "seed": "Calibration seed", "text_sha256": "Text sha256"}
    size = (("Calibration size", f"{windows[0]} windows of {windows[1]} tokens"),) if all(windows) else ()
    return (*facts, *_facts(plan, names), *_facts(calibration, drawn), *size)


def _reconstruction_facts(records: Records) -> Facts:
    """Facts about reconstruction, if any."""
    result = records.result(stage.RECONSTRUCT, Reconstructed)
    if result is None:
        return ()
    fitted = f"{len(result.explained_share)} output projections refitted on {result.tokens:,} calibration"
    ridge = "of each linear by held-out windows" if result.ridge is None else f"{result.ridge:g}"
    return (("Reconstruction", f"{fitted} tokens, ridge {ridge}; it gains most on text like them"),)


def _quality_facts(records: Records) -> Facts:
    variants = (records.benchmark or {}).get("variants") or ()
    tokens = next((q["tokens"] for v in variants if (q := v.get("quality")) and q.get("tokens")), None)
    if tokens is None:
        return ()
    forced = (("Evaluation reading", TEACHER_FORCING),) if encoder_decoder(records) else ()
    return (
        ("Evaluation text", evaluation_source(records) or "not recorded"),
        ("Evaluation size", f"{tokens:,} predicted tokens" + _in_windows(records)),
        *forced,
    )


def _in_windows(records: Records) -> str:
    window_tokens = ((records.benchmark or {}).get("evaluation") or {}).get("window_tokens")
    return f" in windows of {window_tokens:,}" if window_tokens else ""


def without_folders(command: str) -> str:
    """``command`` with the last name in place of every absolute path: reports travel, homes don't."""
    try:
        words = shlex.split(command)
    except ValueError:  # a manifest that another hand wrote
        words = re.sub("['\"]", " ", command).split()
    pieces = [re.split("([=,:])", word) for word in words]
    return shlex.join(
        "".join(Path(piece).name if piece.startswith(("/", "~")) else piece for piece in word)
        for word in pieces
    )


def _cut(facts: Facts) -> Facts:
    """Facts about the origin as a report may show them; the manifest has the whole paths."""
    shown = []
    for label, value in facts:
        kind, _, place = value.partition(" ")
        if label == "Command":
            value = without_folders(value)
        elif Path(place).is_absolute():  # folder /home/me/model
            value = f"{kind} {Path(place).name}"
        shown.append((label, value))
    return tuple(shown)


def details(records: Records) -> tuple[tuple[str, Facts], ...]:
    """Return non-empty groups of facts, each under its heading."""
    manifest, benchmark = records.manifest or {}, records.benchmark or {}
    workload = {
        "prompt_tokens": "Prompt tokens",
        "new_tokens": "New tokens",
        "batch_size": "Batch size",
        "repeats": "Repeats, alternating",
        "warmup": "Warm-up runs, dropped",
        "threads": "Threads",
        "seed": "Seed",
    }
    environment = benchmark.get("environment") or manifest.get("environment") or {}
    origin = {"name": "Model", "origin": "Origin", "licence": "Licence of the weights"}
    groups = (
        ("Pruning", (*_pruning_facts(records.plan or {}), *_reconstruction_facts(records))),
        (
            "Measurement",
            (
                *_facts(benchmark.get("workload"), workload),
                *((("Prefill", PREFILL),) if benchmark and encoder_decoder(records) else ()),
                *_speed_facts(benchmark),
                *_quality_facts(records),
            ),
        ),
        ("Environment", _facts(environment, {key: _spelled(key) for key in environment})),
        (
            "Origin",
            (
                *_cut(_facts(manifest.get("model"), origin)),
                *_cut(_facts(manifest, {"tool": "Made by", "command": "Command"})),
            ),
        ),
    )
    return tuple((heading, facts) for heading, facts in groups if facts)
