"""The linears of a block that read units and add to the hidden states (o, down), and what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import WeightSource

_TINY = 1e-12


@dataclass(frozen=True)
class Reader:
    """One o or down."""

    name: str
    """Of its weight in the checkpoint."""
    position: int
    """In ``shape.layers``."""
    linear: nn.Linear
    norm: nn.Module
    """Reads the hidden states that the linear adds to."""
    ffn: nn.Module | None
    """What lies between norm and hidden states, for a down; None for an o."""
    groups: int | None
    """KV groups whose columns it reads; None for a down, whose columns are neurons."""


class _Seen(Exception):  # noqa: N818 (nothing went wrong)
    """The inputs are known; the rest need not run."""


def readers_of(shape: ModelShape, positions: Sequence[int], block: nn.Module) -> list[Reader]:
    """Readers of one block in the order in which they run: all attentions stand before the FFN."""
    places = [(position, *shape.place(position)) for position in positions]
    modules: list[tuple[int, str, str, str | None, int | None]] = [
        (position, prefix, site.o, site.input_norm, shape.layers[position].kv_heads)
        for position, site, prefix in places
    ]
    modules += [
        (position, prefix, site.ffn_down, site.ffn_norm, None)
        for position, site, prefix in places
        if site.ffn_norm
    ]
    found = []
    for position, prefix, name, norm, groups in modules:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear) and norm is not None
        ffn = block.get_submodule(name.rpartition(".")[0]) if groups is None else None
        weight = f"{prefix}.{name}.weight"
        found.append(Reader(weight, position, linear, block.get_submodule(norm), ffn, groups))
    return found


def importance(states: torch.Tensor) -> torch.Tensor:
    """w [n, T, 1]: the inverse size of states [n, T, D]: errors count as the next norm sees them."""
    return states.square().mean(-1, keepdim=True).clamp_min(_TINY).rsqrt()


def up_to(reader: Reader, run: Callable[[], object]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run as far as a reader: (the hidden states [n, T, D] it adds to, its inputs [n, T, k])."""
    seen: list[torch.Tensor] = []

    def last(inputs: torch.Tensor) -> None:
        seen.append(inputs)
        raise _Seen

    with watched(reader.norm, seen.append), watched(reader.linear, last), suppress(_Seen):
        run()
    entered, inputs = seen
    return entered, inputs


@contextmanager
def watched(module: nn.Module, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """While the block runs, call ``see`` with the inputs of ``module``."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        see(inputs[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changed(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """While the block runs, give the outputs of ``module`` to ``change``; what it returns replaces them."""

    def hook(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        return change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def set_columns(linear: nn.Linear, kept: torch.Tensor, weight: torch.Tensor) -> None:
    """Give a linear the columns ``weight`` [D, k] at ``kept`` and zeros elsewhere."""
    whole = torch.zeros_like(linear.weight)
    linear.weight = nn.Parameter(whole.index_copy_(1, kept.to(whole.device), weight.to(whole.device)))


def stored_as(weights: WeightSource, name: str, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` in the type that the checkpoint stores ``name`` in."""
    return weight.to(weights.dtype(name)).contiguous()
