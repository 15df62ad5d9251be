"""The stacks of a model (``model/family.py``) as modules: blocks, how one runs, and the norm at the end.

Blocks are modules of transformers on torch's meta device; ``loading.py`` gives them weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.family import Computation, Stack
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import expected_shapes

Run = Callable[[nn.Module, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(block with weights, states [n, T, D], unpadded, context [n, S, D] or None) -> states [n, T, D]."""


@dataclass(frozen=True)
class Block:
    """One block of a stack."""

    module: nn.Module
    prefix: str
    """Of its tensors' names in the checkpoint."""
    layers: tuple[int, ...]
    """Positions in ``shape.layers`` of the attentions that lie in it."""


@dataclass(frozen=True)
class RunnableStack:
    """Blocks that run one after another, and the RMS norm behind the last."""

    blocks: tuple[Block, ...]
    run: Run
    norm: str
    """Name of the norm's weight in the checkpoint."""
    epsilon: float
    offset: float = 0.0
    """What is added to the norm's weight."""
    scale: float = 1.0
    """Factor behind the norm."""
    embedding_scale: float = 1.0
    """Factor on the rows of the embedding that enter the first block."""


def stacks_of(checkpoint: Checkpoint, *, device: torch.device) -> tuple[RunnableStack, ...]:
    """The stacks of a model in the order in which they run; each reads the one before it, if any."""
    shape, model = checkpoint.shape, checkpoint.meta_model()
    layers: dict[str, list[int]] = {}
    for layer in range(len(shape.layers)):
        layers.setdefault(shape.place(layer)[1], []).append(layer)

    def blocks(stack: Stack) -> tuple[Block, ...]:
        depth = sum(layer.site == stack.sites[0].name for layer in shape.layers)
        names = [stack.block(index) for index in range(depth)]
        for name in names:
            for position in layers[name]:
                _take_apart(model.get_submodule(name), shape, position)
        return tuple(Block(model.get_submodule(name), name, tuple(layers[name])) for name in names)

    if shape.family.computation is not None:
        [stack] = shape.family.stacks
        return (_decoder(blocks(stack), stack, model, checkpoint.computation, device),)
    scaled = getattr(model.config, "scale_decoder_outputs", False)
    return tuple(
        RunnableStack(
            blocks=blocks(stack),
            run=_t5_run(stack, device),
            norm=f"{stack.final_norm}.weight",
            epsilon=model.config.layer_norm_epsilon,
            scale=shape.hidden_size**-0.5 if scaled and stack is shape.family.stacks[-1] else 1.0,
        )
        for stack in shape.family.stacks
    )


class _SideBySide(nn.Module):
    """Linears of one input, whose outputs lie side by side: a fused linear in its parts."""

    def __init__(self, parts: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def _take_apart(block: nn.Module, shape: ModelShape, position: int) -> None:
    """Put the parts of every fused linear of a block in its place, so that they have the names of weights."""
    site, prefix = shape.place(position)
    sizes = expected_shapes(shape)
    for module in site.fused:
        parts = {}
        for part in site.parts(module):
            outputs, inputs = sizes[f"{prefix}.{part}.weight"]
            parts[part.rpartition(".")[2]] = nn.Linear(inputs, outputs, bias=False, device="meta")
        parent, _, name = module.rpartition(".")
        setattr(block.get_submodule(parent), name, _SideBySide(parts))


def _decoder(
    blocks: tuple[Block, ...],
    stack: Stack,
    model: PreTrainedModel,
    computation: Computation,
    device: torch.device,
) -> RunnableStack:
    return RunnableStack(
        blocks=blocks,
        run=_rotary_run(model, computation, device),
        norm=f"{stack.final_norm}.weight",
        epsilon=model.config.rms_norm_eps,
        offset=computation.norm_offset,
        scale=computation.logits_scale,
        embedding_scale=computation.embedding_scale,
    )


def _rotary_run(model: PreTrainedModel, computation: Computation, device: torch.device) -> Run:
    """Causal attention, rotary positions from 0; where a layer has a window, its mask."""
    described = model.model.rotary_emb
    rotary = type(described)(described.config)  # a real one: its frequencies are no weights

    @cache
    def positions(tokens: int, kind: str) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        numbers = torch.arange(tokens, device=device)[None]
        return numbers, rotary(torch.empty(0, device=device), numbers, *filter(None, [kind]))

    @cache
    def mask(tokens: int, window: int | None) -> torch.Tensor | None:
        if window is None or tokens <= window:
            return None
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
        return seen.tril().triu(diagonal=1 - window)[None, None]

    def run(block: nn.Module, states: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        index: Any = block.get_submodule("self_attn").layer_idx
        tokens, attention = states.shape[1], computation.layers[index]
        numbers, angles = positions(tokens, attention.kind)
        output: torch.Tensor = block(
            states,
            attention_mask=mask(tokens, attention.window),
            position_ids=numbers,
            position_embeddings=angles,
            use_cache=False,
        )
        return output

    return run


def _t5_run(stack: Stack, device: torch.device) -> Run:
    """Every block adds the position bias [1, H, T, T] that the first one computes, which must run first."""
    biases: dict[int, torch.Tensor] = {}

    @cache
    def mask(tokens: int) -> torch.Tensor | None:
        if not stack.causal:
            return None
        hidden_from = torch.full((tokens, tokens), torch.finfo(torch.float32).min)
        return hidden_from.triu(diagonal=1)[None, None].to(device)

    def run(block: nn.Module, states: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        tokens = states.shape[1]
        first = block.get_submodule("layer.0.SelfAttention").has_relative_attention_bias
        output, bias, _ = block(
            states,
            attention_mask=mask(tokens),
            position_bias=None if first else biases[tokens],
            encoder_hidden_states=context,
        )
        if first:
            biases[tokens] = bias.detach()
        left: torch.Tensor = output
        return left

    return run
