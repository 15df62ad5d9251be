"""The two ends of a streamed model: token rows of the embedding, and the head in blocks of the vocabulary.

For V = 128256 and D = 4096 either matrix takes 2.1 GB in float32. Only the rows of the tokens at hand are
read of the embedding; of the head, one block of rows is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import WeightSource
from nirvana_deploy.prune.saliency.gradient import Head, OutputGradient
from nirvana_deploy.prune.streaming.loading import CPU

BLOCK_ROWS = 8192
"""Vocabulary entries per block: 134 MB of a head with D = 4096."""


def embedded(
    weights: WeightSource, shape: ModelShape, tokens: torch.Tensor, *, scale: float = 1.0
) -> torch.Tensor:
    """Rows [n, T, D] of the embedding times ``scale``, float32, for tokens [n, T]."""
    distinct, places = np.unique(tokens.numpy(), return_inverse=True)
    rows = weights.rows(f"{shape.family.embedding}.weight", torch.from_numpy(distinct))
    scaled = rows.to(torch.float32) if scale == 1 else rows.to(torch.float32) * scale
    return scaled[torch.from_numpy(places).reshape(tokens.shape)]


def head_name(shape: ModelShape) -> str:
    """Name of the tensor [V, D] that turns states into logits."""
    return f"{shape.family.embedding if shape.tied_embeddings else shape.family.head}.weight"


def head_blocks(
    weights: WeightSource, shape: ModelShape, device: torch.device = CPU, *, block_rows: int = BLOCK_ROWS
) -> Head:
    """The head as blocks of ``block_rows`` rows, float32, each read when its turn comes."""

    def blocks() -> Iterator[torch.Tensor]:
        for start in range(0, shape.vocab_size, block_rows):
            rows = slice(start, min(start + block_rows, shape.vocab_size))
            yield weights.rows(head_name(shape), rows).to(device, torch.float32)

    return blocks


def states_gradient(
    states: torch.Tensor,
    tokens: torch.Tensor,
    *,
    final: Callable[[torch.Tensor], torch.Tensor],
    head: Head,
    output_gradient: OutputGradient,
) -> torch.Tensor:
    """Gradient [n, T, D] of a functional by the states [n, T, D] that left the last block.

    ``final`` is the norm between them and the head.
    """
    leaf = states.detach().requires_grad_()
    normed = final(leaf)
    (gradient,) = torch.autograd.grad(normed, leaf, output_gradient(normed.detach(), tokens, head))
    return gradient
