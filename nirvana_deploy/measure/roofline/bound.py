"""How long a pass takes at least on this machine: its bytes over what memory gives, or its products.

bound = max(bytes / bandwidth, sum over kinds of operations / rate of the kind) [roofline: Williams, Waterman
and Patterson, CACM 2009]. The bandwidth is the median between the rounds of the benchmark, since it drifts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from nirvana_deploy.measure.bounds import Phase
from nirvana_deploy.measure.roofline.ceilings import Ceilings

_NOISE = 0.05


@dataclass(frozen=True)
class Roof:
    """What the machine reaches while a benchmark runs."""

    ceilings: Ceilings
    memory_gb_per_s: float
    """Read, during this benchmark."""

    def record(self) -> dict[str, Any]:
        """For benchmark.json."""
        return {**asdict(self.ceilings), "memory_gb_per_s": self.memory_gb_per_s}


def roof_of(ceilings: Ceilings, read_gb_per_s: Sequence[float]) -> Roof:
    """``ceilings`` with the median of the bandwidths that were seen between rounds, if any."""
    return Roof(ceilings, median(read_gb_per_s) if read_gb_per_s else ceilings.read_gb_per_s)


def outrun(ceilings: Ceilings, passes: Iterable[tuple[Phase, float]]) -> bool:
    """Whether one of these passes shows that a ceiling of products was measured beside other work."""
    reached = raised(roof_of(ceilings, []), passes).ceilings.gop_per_s
    return any(reached[kind] > rate * (1 + _NOISE) for kind, rate in ceilings.gop_per_s.items())


def raised(roof: Roof, passes: Iterable[tuple[Phase, float]]) -> Roof:
    """``roof``, and at least what these passes of so many ms reached: no program is faster than its machine.

    Of a pass that multiplies several kinds, the rate of none is known.
    """
    memory, rates = roof.memory_gb_per_s, dict(roof.ceilings.gop_per_s)
    for phase, measured_ms in passes:
        memory = max(memory, phase.moved_bytes / measured_ms / 1e6)
        if len(phase.operations) == 1:
            [(kind, count)] = phase.operations.items()
            if kind in rates:
                rates[kind] = max(rates[kind], count / measured_ms / 1e6)
    return Roof(replace(roof.ceilings, gop_per_s=rates), memory)


def bounded(phase: Phase, measured_ms: float, roof: Roof) -> dict[str, Any]:
    """The work of one pass, what it reached, and the share of its bound; the record of a phase.

    Without a rate for what is multiplied, the bound is None.
    """
    rates = roof.ceilings.gop_per_s
    memory_ms = phase.moved_bytes / roof.memory_gb_per_s / 1e6
    known = all(kind in rates for kind in phase.operations)
    products_ms = sum(count / rates[kind] / 1e6 for kind, count in phase.operations.items() if kind in rates)
    bound_ms = max(memory_ms, products_ms) if known else None
    return {
        "weight_bytes": phase.weight_bytes,
        "cache_read_bytes": phase.cache_read_bytes,
        "cache_written_bytes": phase.cache_written_bytes,
        "logits_bytes": phase.logits_bytes,
        "moved_bytes": phase.moved_bytes,
        "operations": dict(phase.operations),
        "operations_per_byte": phase.all_operations / phase.moved_bytes,
        "gop_per_s": phase.all_operations / measured_ms / 1e6,
        "gb_per_s": phase.moved_bytes / measured_ms / 1e6,
        "memory_ms": memory_ms,
        "products_ms": products_ms if known else None,
        "bound_ms": bound_ms,
        "share_of_bound": None if bound_ms is None else bound_ms / measured_ms,
    }
