"""Quality of a variant against the baseline: perplexity, KL divergence, top-1 agreement.

Means over the positions whose next token is known: T - 1 of each window, or its second half for an
encoder-decoder, whose encoder reads the first. Sums run in float64 over blocks of positions, so memory is the
float32 logits [T, V] of the baseline, one variant and its parent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.runtime.divergence import kl_terms, log_softmax
from nirvana_deploy.runtime.runner import Runner, window_logits

_BLOCK_BYTES = 1 << 19
"""Of logits in float64 at a time: what a core's own cache holds; passes over more wait for memory."""


@dataclass(frozen=True)
class PositionScores:
    """Scores of one variant on one window, per position [T - 1]."""

    negative_log_likelihood: NDArray[np.float64]
    """-log q(next token), nats."""
    kl: NDArray[np.float64]
    """KL(p || q) of the baseline's p against the variant's q, nats."""
    top1_agrees: NDArray[np.bool_]
    """Whether both rank the same token first."""


def quality_of(
    baseline: Runner,
    variants: Mapping[str, Runner],
    windows: NDArray[np.int64],
    *,
    baseline_name: str = "dense",
    parents: Mapping[str, str] | None = None,
    kinds: Sequence[str] = (),
    progress: Progress = SILENT,
) -> dict[str, dict[str, Any]]:
    """Judge the baseline and every variant on ``windows`` [M, T]; the baseline runs once per window.

    Returns, under ``baseline_name`` and each variant's name, ``perplexity`` of the next token,
    ``kl_vs_dense`` (mean over tokens of KL(baseline || variant), nats), its ``kl_standard_error`` over
    windows (None for one window) and ``kl_standard_error_tokens`` over tokens, ``top1_agreement`` (share of
    positions), ``tokens`` and ``windows``, and the means of each window, ``nll_by_window`` and
    ``kl_by_window``. A variant that ``parents`` maps to another one, judged before it,
    also gets ``kl_vs_parent``: how far quantization alone carried it. The error over windows is the one to
    quote: tokens of one window are correlated, which makes the other too small. ``kinds`` names the kind of
    text of each window; ``parts`` then holds the same numbers for each kind.

    Raises NirvanaError for windows without a next token, logits that are not finite, or vocabularies that
    differ.
    """
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise NirvanaError(
            f"Quality needs windows [M, T] with M >= 1 and T >= 2 tokens, got {windows.shape}."
        )
    scores: dict[str, list[PositionScores]] = {name: [] for name in (baseline_name, *variants)}
    to_dense = [name for name, parent in (parents or {}).items() if parent == baseline_name]
    parents = {name: parent for name, parent in (parents or {}).items() if parent != baseline_name}
    to_parent: dict[str, list[NDArray[np.float64]]] = {name: [] for name in parents}
    on = f" on {', '.join(dict.fromkeys(kinds))}" if kinds else ""
    with progress.task(f"Quality{on}", len(windows) * len(scores)) as advance:
        for index, window in enumerate(windows):
            reference = _logits(baseline, window, of=f"{baseline_name}, window {index}")
            next_tokens = window[-len(reference) :]
            scores[baseline_name].append(position_scores(reference, reference, next_tokens))
            of_parents: dict[str, NDArray[np.float32]] = {}
            advance(1)
            for name, variant in variants.items():
                logits = _logits(variant, window, of=f"{name}, window {index}")
                if logits.shape != reference.shape:
                    raise NirvanaError(
                        f"{name} has {logits.shape[1]} logits per token and {baseline_name} "
                        f"{reference.shape[1]}; a KL divergence needs one vocabulary."
                    )
                scores[name].append(position_scores(reference, logits, next_tokens))
                if name in parents:
                    compared = position_scores(of_parents[parents[name]], logits, next_tokens)
                    to_parent[name].append(compared.kl)
                if name in parents.values():
                    of_parents[name] = logits
                del logits  # before the next variant makes its own
                advance(1)
    found = {name: _quality(of_windows) for name, of_windows in scores.items()}
    if kinds:
        for name, of_windows in scores.items():
            found[name]["parts"] = _by_kind(of_windows, kinds)
    for name, divergences in to_parent.items():
        found[name]["kl_vs_parent"] = float(np.concatenate(divergences).mean())
    for name in to_dense:
        found[name]["kl_vs_parent"] = found[name]["kl_vs_dense"]
    return found


def position_scores(
    baseline_logits: NDArray[np.float32], logits: NDArray[np.float32], next_tokens: NDArray[np.int64]
) -> PositionScores:
    """Compare two sets of logits [T - 1, V] position by position, given the true next tokens [T - 1]."""
    count = len(next_tokens)
    kl, likelihood = np.empty(count), np.empty(count)
    rows = max(1, _BLOCK_BYTES // (8 * logits.shape[1]))
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        log_q = log_softmax(logits[block].astype(np.float64))
        log_p = log_q if logits is baseline_logits else log_softmax(baseline_logits[block].astype(np.float64))
        likelihood[block] = np.take_along_axis(log_q, next_tokens[block, None], axis=1)[:, 0]
        kl[block] = kl_terms(log_p, log_q).sum(axis=1)
    agrees = baseline_logits.argmax(axis=1) == logits.argmax(axis=1)
    return PositionScores(negative_log_likelihood=-likelihood, kl=kl, top1_agrees=agrees)


def _logits(runner: Runner, window: NDArray[np.int64], *, of: str) -> NDArray[np.float32]:
    """Logits [P, V] that predict the last P tokens of ``window`` [T]."""
    logits: NDArray[np.float32] = window_logits(runner, window[None])[0]
    if len(logits) == 1:
        raise NirvanaError(
            f"Quality is measured at every position, and {of} gives the logits of the last one alone.",
            hint="Export without --last-logits, and build the engine again.",
        )
    logits = logits[:-1]
    if not np.isfinite(logits).all():
        position = int(np.argmin(np.isfinite(logits).all(axis=1)))
        raise NirvanaError(f"Logits of {of} are not finite (NaN or infinite), first at position {position}.")
    return logits


def _quality(of_windows: list[PositionScores]) -> dict[str, Any]:
    kl = np.concatenate([scores.kl for scores in of_windows])
    nll = np.concatenate([scores.negative_log_likelihood for scores in of_windows])
    return {
        "perplexity": float(np.exp(nll.mean())),
        "kl_vs_dense": float(kl.mean()),
        "kl_standard_error": _standard_error(np.array([scores.kl.mean() for scores in of_windows])),
        "kl_standard_error_tokens": _standard_error(kl),
        "top1_agreement": float(np.concatenate([scores.top1_agrees for scores in of_windows]).mean()),
        "tokens": len(kl),
        "windows": len(of_windows),
        "nll_by_window": [float(scores.negative_log_likelihood.mean()) for scores in of_windows],
        "kl_by_window": [float(scores.kl.mean()) for scores in of_windows],
    }


def _by_kind(of_windows: Sequence[PositionScores], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    by_kind: dict[str, list[PositionScores]] = {kind: [] for kind in kinds}
    for kind, scores in zip(kinds, of_windows, strict=True):
        by_kind[kind].append(scores)
    return {kind: _quality(of_kind) for kind, of_kind in by_kind.items()}


def _standard_error(values: NDArray[np.float64]) -> float | None:
    """Standard error of the mean of independent ``values``; None for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
