"""One point of a search: a sparsity and a precision, and what was found of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.units import format_bytes
from nirvana_deploy.output.layout import POINTS
from nirvana_deploy.output.variants import DENSE, PRUNED, ModelVariant, quantized_variant, variant_named
from nirvana_deploy.search.ways import OWN, Way

SCHEMA = 2


@dataclass(frozen=True)
class Point:
    """What is deployed: the dense model or a cut, in float or quantized."""

    sparsity: float
    """0 for the dense model."""
    scheme: str | None = None
    way: Way = OWN
    """How is cut; of no concern to the dense model."""

    @property
    def cut(self) -> str:
        """The cut, whatever its precision: "dense", "s0.2", "s0.2-nirvana"."""
        if not self.sparsity:
            return DENSE
        return "-".join(word for word in (f"s{self.sparsity:g}", self.way.name) if word)

    @property
    def name(self) -> str:
        """For people and records: "dense-w4", "s0.2", "s0.2-int8", "s0.2-nirvana-int8"."""
        return f"{self.cut}-{self.scheme}" if self.scheme else self.cut


@dataclass(frozen=True)
class Found:
    """What is known of a point."""

    schema: int
    key: str
    """Of all that the search has in common: model, calibration, how is cut and exported."""
    name: str
    sparsity: float
    scheme: str | None
    way: str
    """The name of the way to cut, empty for the search's own."""
    options: dict[str, Any]
    """What that way sets, by name."""
    folder: str
    """The output folder of the cut, relative to the search's."""
    failed: str | None = None
    """Why there is nothing more to say."""
    unverified: str | None = None
    """What its verification found wrong; it was measured all the same."""
    kl: float | None = None
    """Nats per token, to the dense model in float."""
    kl_standard_error: float | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    """To the dense model in float, on the worst kind of text."""
    weights_bytes: int | None = None
    accuracy: float | None = None
    """Zero-shot, the mean over tasks; None where none was asked for."""
    accuracy_standard_error: float | None = None
    tpot_ms: float | None = None
    """Median over the rounds; None where it was not timed."""
    speedup: float | None = None
    """Of decoding over the dense model in float, in the same rounds."""
    speedup_interval: tuple[float, float] | None = None
    """Where its true median is (``measure/rounds/ratios.py``)."""

    @property
    def point(self) -> Point:
        """What was asked."""
        return Point(self.sparsity, self.scheme, Way(self.way, tuple(sorted(self.options.items()))))

    @property
    def variant(self) -> ModelVariant:
        """The model in the folder of the cut."""
        of = PRUNED if self.sparsity else DENSE
        return quantized_variant(self.scheme, of=of) if self.scheme else variant_named(of)


def key_of(common: Mapping[str, Any]) -> str:
    """The hash of what all points of a search have in common."""
    return _hash(common)


def nothing_found(key: str, point: Point, folder: str) -> Found:
    """A point that nothing is known of yet."""
    way = point.way
    return Found(SCHEMA, key, point.name, point.sparsity, point.scheme, way.name, dict(way.options), folder)


def file_of(key: str, point: Point) -> str:
    """Where the result of a point lies, relative to the search's folder."""
    return f"{POINTS}/{_hash([key, asdict(point)])}.json"


def read_found(path: Path, *, key: str, point: Point) -> Found:
    """The result of a point; raises NirvanaError for one that is broken, or of another search or point."""
    found = read_json(path, Found, schema=SCHEMA)
    if found.key != key:
        raise NirvanaError(
            f"{path} is of another search: another model, calibration or way to cut ({found.name}).",
            hint="Search into another folder: --out DIR",
        )
    if (found.point, found.name) != (point, point.name) or Path(found.folder).name != found.folder:
        raise NirvanaError(
            f"{path} is no result of {point.name}: it says {found.name!r}, in the folder {found.folder!r}.",
            hint="Move it away, and --resume measures the point again.",
        )
    return found


def said(found: Found) -> str:
    """A point with its numbers: s0.2-w4 (KL 0.0801, 12.3 ms a token, 2.1 times as fast as dense, 95 MB)."""
    facts = [] if found.kl is None else [f"KL {found.kl:.3g}"]
    if found.tpot_ms is not None:
        facts.append(f"{found.tpot_ms:.3g} ms a token")
    if found.speedup is not None and found.name != "dense":
        facts.append(f"{found.speedup:.3g} times as fast as dense")
    if found.weights_bytes is not None:
        facts.append(f"{format_bytes(found.weights_bytes)}")
    return f"{found.name} ({', '.join(facts)})"


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
