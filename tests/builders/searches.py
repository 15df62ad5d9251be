"""Records of invented searches."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

from nirvana_deploy.report.pages.front import search_record
from nirvana_deploy.search.front import recommend
from nirvana_deploy.search.point import Found, Point, nothing_found
from nirvana_deploy.search.recipe import Target
from nirvana_deploy.search.ways import OWN, Way

SCHEMES = {None: (1.0, 0.0), "int8": (0.41, 0.04), "w4": (0.33, 0.1)}
"""Of a precision, its share of the bytes and its KL."""
OTHER = Way("nirvana-global", (("allocation", "global"), ("saliency", "nirvana")))
_TIMED = {
    "environment": {"cpu": "a processor"},
    "workload": {"threads": 2, "prompt_tokens": 128, "new_tokens": 64},
}


def searched(*, ways: tuple[Way, ...] = (OWN,), timed: bool = True, accuracy: bool = False) -> dict[str, Any]:
    """A search.json of six sparsities in three precisions; one point failed, one is not verified."""
    points = [Point(0.0, scheme) for scheme in SCHEMES]
    points += [Point(s / 10, scheme, way) for way, s, scheme in product(ways, range(1, 6), SCHEMES)]
    found = [_found(point, timed=timed, accuracy=accuracy) for point in points]
    found[-1] = replace(nothing_found("key", points[-1], "s0.5"), failed="There is no memory for it.")
    found[-2] = replace(found[-2], unverified="209 of 210 linears run in integer kernels.")
    advice = recommend(found, Target(max_kl=0.2))
    assert advice.point is not None
    folder = f"{advice.point.folder}/{advice.point.variant.folder}"
    commands = [f"nirvana-deploy generate {folder} --prompt 'The capital of France is'"]
    return search_record("smollm2", found, advice, _TIMED if timed else None, commands=commands)


def _found(point: Point, *, timed: bool, accuracy: bool) -> Found:
    share, kl = SCHEMES[point.scheme]
    kept, loss = 1 - 0.8 * point.sparsity, 3.5 * point.sparsity**1.4 * (1.6 if point.way.name else 1.0)
    tpot_ms = 33 * (0.08 + kept * share**0.8)
    plain = point == Point(0.0)
    return replace(
        nothing_found("key", point, point.cut if point.sparsity else "s0.1"),
        kl=kl + loss,
        kl_standard_error=0.0 if plain else 0.05 * (kl + loss) + 0.002,
        perplexity=14.8 * (1 + kl + loss),
        perplexity_ratio=1 + kl + loss,
        weights_bytes=int(539e6 * share * (0.2 + 0.8 * kept)),
        accuracy=0.45 - 0.1 * (kl + loss) if accuracy else None,
        accuracy_standard_error=0.011 if accuracy else None,
        tpot_ms=tpot_ms if timed else None,
        speedup=35.64 / tpot_ms if timed else None,
        speedup_interval=(34.9 / tpot_ms, 36.1 / tpot_ms) if timed else None,
    )
