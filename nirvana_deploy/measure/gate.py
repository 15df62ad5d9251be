"""A limit on quality that a folder must keep: for pipelines that ship what passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nirvana_deploy.base.errors import QualityError
from nirvana_deploy.measure.recipe import Gate
from nirvana_deploy.output.record_kinds import Quality
from nirvana_deploy.output.variants import DENSE


def require_quality(variants: Mapping[str, Quality], gate: Gate) -> None:
    """Raise QualityError where a model that is not the dense one misses a limit of ``gate``.

    The perplexity ratio is held on each kind of text that was told apart. What was not measured is missed,
    and with no such model among ``variants`` nothing was.
    """
    asked = gate.require_kl is not None or gate.require_perplexity_ratio is not None
    cut = [name for name in variants if not name.startswith(DENSE)]
    if asked and not cut:
        raise QualityError(
            "Quality is required, and that of no cut model was measured.",
            hint="It needs the folder's ONNX models: nirvana-deploy prune-export ... --resume, "
            "then nirvana-deploy evaluate OUT",
        )
    missed = [said for name in cut for said in _missed(variants, name, gate)]
    if missed:
        raise QualityError(
            f"The models do not have the quality that is required: {'; '.join(missed)}.",
            hint="They are kept. Remove less, or train the model: nirvana-deploy recover OUT --minutes 30",
        )


def _missed(variants: Mapping[str, Quality], name: str, gate: Gate) -> Iterator[str]:
    found, dense = variants[name], variants.get(DENSE, {})
    kl = found.get("kl_vs_dense")
    if gate.require_kl is not None and (kl is None or kl > gate.require_kl):
        had = "not measured" if kl is None else f"{kl:.3g}"
        yield f"KL of {name} is {had}, required at most {gate.require_kl:g}"
    if gate.require_perplexity_ratio is None:
        return
    known = perplexity_ratios(found, dense)
    limit = f"required at most {gate.require_perplexity_ratio:g}"
    if not known:
        yield f"perplexity of {name} was not measured beside dense's, {limit}"
    yield from (
        f"perplexity of {name} is {ratio:.3g} times dense's on {kind}, {limit}"
        for kind, ratio in known.items()
        if ratio > gate.require_perplexity_ratio
    )


def perplexity_ratios(found: Quality, dense: Quality) -> dict[str, float]:
    """Perplexity in times of dense's, on all held-out text and by kind where kinds were told apart."""
    dense_parts = dense.get("parts", {})
    texts = {"held-out text": (found, dense)}
    texts |= {kind: (part, dense_parts.get(kind, {})) for kind, part in found.get("parts", {}).items()}
    ratios = {kind: _ratio(*pair) for kind, pair in texts.items()}
    return {kind: ratio for kind, ratio in ratios.items() if ratio is not None}


def _ratio(found: Quality, dense: Quality) -> float | None:
    after, before = found.get("perplexity"), dense.get("perplexity")
    return after / before if after and before else None
