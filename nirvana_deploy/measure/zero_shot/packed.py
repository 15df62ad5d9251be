"""Log-likelihoods of many continuations in few forward passes of a transformers decoder.

The sequences of a pass form a trie of tokens: every distinct prefix is one position, which attends to its
ancestors alone. Choices share their query, contexts their beginning, nothing is padded, and the head runs on
the positions that predict a continuation. The logits are those of each sequence on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.model.families.decoder_only import SLIDING

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context and of its continuation; neither is empty."""


@dataclass(frozen=True)
class Trie:
    """Distinct prefixes of sequences, parents before children."""

    tokens: NDArray[np.int64]
    """Last token of each prefix [T]."""
    depths: NDArray[np.int64]
    """Position of that token in its sequences [T]."""
    ancestors: NDArray[np.bool_]
    """Whether position column is row itself or stands before it in its sequences [T, T]."""
    paths: tuple[tuple[int, ...], ...]
    """Positions of each sequence, in order."""


def attends_to_all(config: Any, *, tokens: int) -> bool:
    """Whether each layer of a transformers ``config`` sees all of a sequence of ``tokens``.

    Elsewhere packs do not compute what a sequence alone gives: transformers takes their mask as it is for
    every layer, so that none would have its window, and a recurrent layer reads no mask.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or (SLIDING,)) - {"full_attention"}
    window = getattr(text, "sliding_window", None)
    return not kinds or (kinds == {SLIDING} and (window is None or window >= tokens))


def trie_of(sequences: Sequence[Sequence[int]]) -> Trie:
    """Return the trie of ``sequences``, which are in lexicographic order."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    paths: list[tuple[int, ...]] = []
    before: Sequence[int] = ()
    for sequence in sequences:
        shared = common_prefix(before, sequence)
        path = list(paths[-1][:shared]) if paths else []
        for depth in range(shared, len(sequence)):
            parents.append(path[-1] if path else -1)
            path.append(len(tokens))
            tokens.append(sequence[depth])
            depths.append(depth)
        paths.append(tuple(path))
        before = sequence
    ancestors = np.eye(len(tokens), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    return Trie(np.array(tokens), np.array(depths), ancestors, tuple(paths))


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    shared = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def passes(sequences: Sequence[Sequence[int]], *, max_tokens: int) -> Iterator[list[int]]:
    """Yield indices of the sequences of each pass, in lexicographic order.

    A pass has at most ``max_tokens`` distinct prefixes, or one sequence.
    """
    chosen: list[int] = []
    size = 0
    for index in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        shared = common_prefix(sequences[chosen[-1]], sequences[index]) if chosen else 0
        if chosen and size + len(sequences[index]) - shared > max_tokens:
            yield chosen
            chosen, size, shared = [], 0, 0
        chosen.append(index)
        size += len(sequences[index]) - shared
    if chosen:
        yield chosen


def log_likelihoods(
    model: Any,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    max_tokens: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[tuple[float, bool]]:
    """Return log P(continuation | context) in nats, and whether each of its tokens is the likeliest.

    ``model`` is a decoder of transformers that :func:`attends_to_all` of ``max_length`` tokens. A pair longer
    than ``max_length`` + 1 tokens loses its beginning. A pass computes about ``max_tokens`` positions.
    """
    whole = [[*context, *continuation][-(max_length + 1) :] for context, continuation in pairs]
    lengths = [
        min(len(continuation), len(all_) - 1) for (_, continuation), all_ in zip(pairs, whole, strict=True)
    ]
    inputs = [tokens[:-1] for tokens in whole]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for indices in passes(inputs, max_tokens=max_tokens):
        trie = trie_of([inputs[index] for index in indices])
        ends = [path[-lengths[index] :] for index, path in zip(indices, trie.paths, strict=True)]
        nodes = sorted({node for end in ends for node in end})
        log_p = _log_probabilities(model, trie, nodes)
        place = {node: row for row, node in enumerate(nodes)}
        for index, end in zip(indices, ends, strict=True):
            rows = log_p[[place[node] for node in end]]
            targets = torch.tensor(whole[index][-lengths[index] :], device=rows.device)
            total = float(rows.gather(1, targets[:, None]).sum())
            found[index] = total, bool((rows.argmax(-1) == targets).all())
        advance(len(indices))
    return found


@torch.inference_mode()
def _log_probabilities(model: Any, trie: Trie, nodes: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [len(nodes), V] of what follows each of ``nodes``."""
    device, dtype = model.device, model.dtype
    visible = torch.from_numpy(trie.ancestors).to(device)
    mask = torch.zeros(visible.shape, dtype=dtype, device=device)
    mask.masked_fill_(~visible, torch.finfo(dtype).min)
    logits = model(
        input_ids=torch.from_numpy(trie.tokens)[None].to(device),
        position_ids=torch.from_numpy(trie.depths)[None].to(device),
        attention_mask=mask[None, None],
        use_cache=False,
        logits_to_keep=torch.tensor(nodes, device=device),
    ).logits
    log_p: torch.Tensor = logits[0].float().log_softmax(-1)
    return log_p
