"""The stacks of a model (``model/family.py``) as modules: blocks, how one runs, and the norm at the end.

Blocks are modules of transformers on torch's meta device; ``loading.py`` gives them weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.family import Stack

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
    scale: float = 1.0
    """Factor behind the norm."""


def stacks_of(checkpoint: Checkpoint, *, device: torch.device) -> tuple[RunnableStack, ...]:
    """The stacks of a model in the order in which they run; each reads the one before it, if any."""
    shape, model = checkpoint.shape, checkpoint.meta_model()
    layers: dict[str, list[int]] = {}
    for layer in range(len(shape.layers)):
        layers.setdefault(shape.place(layer)[1], []).append(layer)
    stacks = []
    for stack in shape.family.stacks:
        depth = sum(layer.site == stack.sites[0].name for layer in shape.layers)
        last = stack is shape.family.stacks[-1]
        scaled = last and getattr(model.config, "scale_decoder_outputs", False)
        position_bias = stack.sites[0].position_bias is not None
        stacks.append(
            RunnableStack(
                blocks=tuple(
                    Block(model.get_submodule(name), name, tuple(layers[name]))
                    for name in map(stack.block, range(depth))
                ),
                run=_t5_run(stack, device) if position_bias else _rotary_run(model, device),
                norm=f"{stack.final_norm}.weight",
                epsilon=model.get_submodule(stack.final_norm).variance_epsilon,
                scale=shape.hidden_size**-0.5 if scaled else 1.0,
            )
        )
    return tuple(stacks)


def _rotary_run(model: PreTrainedModel, device: torch.device) -> Run:
    """Causal attention, rotary positions from 0."""
    rotary = type(model.model.rotary_emb)(model.config)  # a real one: its frequencies are no weights

    @cache
    def positions(tokens: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        numbers = torch.arange(tokens, device=device)[None]
        return numbers, rotary(torch.empty(0, device=device), numbers)

    def run(block: nn.Module, states: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        numbers, angles = positions(states.shape[1])
        output: torch.Tensor = block(
            states, attention_mask=None, position_ids=numbers, position_embeddings=angles, use_cache=False
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
