"""The numbers of the first screen: four of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nirvana_deploy.base.units import format_bytes, format_ms, format_number
from nirvana_deploy.output.records import Records
from nirvana_deploy.report.table import (
    Gain,
    baseline_of,
    challengers_of,
    format_change,
    format_times,
    gain,
    median_of,
)


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Tiles:
    """Of which model, and its numbers."""

    of: str
    tiles: tuple[Tile, ...]


def headline_tiles(records: Records, recommended: str | None) -> Tiles:
    """Decode, weight file, memory and quality of the recommended model, or of the first one.

    Absolute without a baseline; what was not measured has no tile.
    """
    benchmark = records.benchmark or {}
    baseline = baseline_of(benchmark)
    variants = challengers_of(benchmark) or ([baseline] if baseline else [])
    if not variants:
        return Tiles("", ())
    variant = next((one for one in variants if one["name"] == recommended), variants[0])
    before = None if variant is baseline else baseline
    against = f" against {before['name']}" if before else ""
    return Tiles(f"{variant['name']}{against}", tuple(_tiles(benchmark, before, variant)))


def _speed(decode: Gain) -> Tile:
    """The ratio over paired rounds and where the true one is, the medians, the bound."""
    notes = [f"{format_ms(decode.before_ms)} to {format_ms(decode.after_ms)} per token"]
    if decode.interval:
        notes.insert(0, f"{format_times(decode.interval[0])} to {format_times(decode.interval[1])}")
    if not decode.shows_difference:
        return Tile("Decode speed-up", "none shown", "; ".join(notes))
    if decode.bound and decode.share_of_bound:
        notes.append(f"{decode.share_of_bound:.0%} of the {format_times(decode.bound)} by bytes")
    return Tile("Decode speed-up", format_times(decode.speedup), "; ".join(notes))


def _tiles(
    benchmark: Mapping[str, Any], baseline: Mapping[str, Any] | None, variant: Mapping[str, Any]
) -> Iterator[Tile]:
    decode = gain(benchmark, variant, "tpot") if baseline else None
    if decode:
        yield _speed(decode)
    elif median_of(variant, "tpot_ms"):
        yield Tile("Decode", format_ms(variant["tpot_ms"]["p50"]), "per token, median")
    for label, key in (("Weight file", "weights_bytes"), ("Peak memory (RSS)", "peak_rss_bytes")):
        after, before = variant.get(key), (baseline or {}).get(key)
        if after is not None:
            change = f"{format_change(before, after)} from {format_bytes(before)}" if before else ""
            yield Tile(label, format_bytes(after), change or "no baseline measured")
    quality, dense = variant.get("quality") or {}, (baseline or {}).get("quality") or {}
    after, before, kl = quality.get("perplexity"), dense.get("perplexity"), quality.get("kl_vs_dense")
    if after is not None:
        note = f"{format_times(after / before)} the dense model's {format_number(before)}" if before else ""
        if before and kl is not None:
            note += f"; KL {format_number(kl)} nats per token"
        yield Tile("Perplexity", format_number(after), note)
