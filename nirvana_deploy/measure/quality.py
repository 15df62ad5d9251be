"""Quality of a variant against the baseline: perplexity, KL divergence, top-1 agreement.

Means over the positions whose next token is known: T - 1 of each window, or its second half for an
encoder-decoder, whose encoder reads the first. Sums run in float64 over blocks of positions, so memory is the
float32 logits [T, V] of all models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import default_threads
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.runtime.divergence import kl_terms, log_softmax
from nirvana_deploy.runtime.runner import Runner, window_logits

_BLOCK_BYTES = 1 << 19
"""Of logits in float64 at a time: what a core's own cache holds; passes over more wait for memory."""
_LogProbabilities = tuple[NDArray[np.float64], NDArray[np.float64]]
"""log p and p of a block of positions, [rows, V]."""


@dataclass(frozen=True)
class PositionScores:
    """Scores of one variant on one window, per position [T - 1]."""

    negative_log_likelihood: NDArray[np.float64]
    """-log q(next token), nats."""
    kl: NDArray[np.float64]
    """KL(p || q) of the baseline's p against the variant's q, nats."""
    top1_agrees: NDArray[np.bool_]
    """Whether both rank the same token first."""
    kl_to_parent: NDArray[np.float64] | None = None
    """KL of its parent's distribution against the variant's, nats, if it has a parent."""


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
    models = {baseline_name: baseline, **variants}
    parents = parents or {}
    scores: dict[str, list[PositionScores]] = {name: [] for name in models}
    on = f" on {', '.join(dict.fromkeys(kinds))}" if kinds else ""
    with progress.task(f"Quality{on}", len(windows) * len(models)) as advance:
        for index, window in enumerate(windows):
            logits: dict[str, NDArray[np.float32]] = {}
            for name, model in models.items():
                logits[name] = _logits(model, window, of=f"{name}, window {index}")
                _require_one_shape(name, logits[name], baseline_name, logits[baseline_name])
                advance(1)
            next_tokens = window[-len(logits[baseline_name]) :]
            for name, of_window in window_scores(logits, next_tokens, parents=parents).items():
                scores[name].append(of_window)
    found = {name: _quality(of_windows) for name, of_windows in scores.items()}
    if kinds:
        for name, of_windows in scores.items():
            found[name]["parts"] = _by_kind(of_windows, kinds)
    for name in parents:
        divergences = [one.kl_to_parent for one in scores[name] if one.kl_to_parent is not None]
        found[name]["kl_vs_parent"] = float(np.concatenate(divergences).mean())
    return found


def window_scores(
    logits: Mapping[str, NDArray[np.float32]],
    next_tokens: NDArray[np.int64],
    *,
    parents: Mapping[str, str] | None = None,
) -> dict[str, PositionScores]:
    """Compare the logits [T - 1, V] of each model with those of the first, given the true next tokens.

    ``parents`` are as in :func:`quality_of`. What several comparisons need of a model is computed once.
    """
    parents, count = parents or {}, len(next_tokens)
    baseline, of_baseline = next(iter(logits.items()))
    scores = {}
    for name in logits:
        kl = np.empty(count)
        parent = parents.get(name)
        to_parent = None if parent is None else kl if parent == baseline else np.empty(count)
        scores[name] = PositionScores(np.empty(count), kl, np.empty(count, dtype=np.bool_), to_parent)

    def score(block: slice) -> None:
        likeliest = of_baseline[block].argmax(axis=1)
        references: dict[str, _LogProbabilities] = {}
        for name, of_model in logits.items():
            into, log_q = scores[name], log_softmax(of_model[block].astype(np.float64))
            if name == baseline or name in parents.values():
                references[name] = log_q, np.exp(log_q)
            own = np.take_along_axis(log_q, next_tokens[block, None], axis=1)[:, 0]
            into.negative_log_likelihood[block] = -own
            into.kl[block] = kl_terms(*references[baseline], log_q).sum(axis=1)
            into.top1_agrees[block] = of_model[block].argmax(axis=1) == likeliest
            if into.kl_to_parent is not None and into.kl_to_parent is not into.kl:
                into.kl_to_parent[block] = kl_terms(*references[parents[name]], log_q).sum(axis=1)

    rows = max(1, _BLOCK_BYTES // (8 * of_baseline.shape[1]))
    with ThreadPoolExecutor(default_threads()) as pool:
        list(pool.map(score, (slice(start, start + rows) for start in range(0, count, rows))))
    return scores


def _require_one_shape(
    name: str, logits: NDArray[np.float32], baseline_name: str, reference: NDArray[np.float32]
) -> None:
    if logits.shape != reference.shape:
        raise NirvanaError(
            f"{name} has {logits.shape[1]} logits per token and {baseline_name} "
            f"{reference.shape[1]}; a KL divergence needs one vocabulary."
        )


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
