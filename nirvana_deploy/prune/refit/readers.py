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
    entry: nn.Module
    """Reads the hidden states that the linear adds to: a norm, else what reads them as they are."""
    ffn: nn.Module | None
    """What lies between entry and linear, for a down; None for an o."""
    groups: int | None
    """KV groups whose columns it reads; None for a down, whose columns are neurons."""
    post_norm: nn.Module | None = None
    """Norm of what the linear gives, ahead of the sum with the hidden states."""
    scale: float = 1.0
    """Factor on it in that sum."""

    def behind(self, entered: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The hidden states [n, T, D] behind the linear, from those it adds to and its output."""
        added = output if self.post_norm is None else self.post_norm(output)
        return entered + (added if self.scale == 1 else added * self.scale)

    def aim(self, entered: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        """What the linear should give, [n, T, D]: behind a norm no sum with the hidden states is linear."""
        if wanted.output is not None:
            return wanted.output
        missing = wanted.states - entered
        return missing if self.scale == 1 else missing / self.scale

    def ffn_output(self, entered: torch.Tensor) -> torch.Tensor:
        """Run what lies behind the hidden states [n, T, D] of a down."""
        assert self.ffn is not None
        return self.ffn(entered if self.entry is self.ffn else self.entry(entered))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Wanted:
    """What the dense model has behind a reader, [n, T, D]."""

    states: torch.Tensor
    output: torch.Tensor | None = None
    """Of the linear, where a norm follows it."""

    def to(self, device: torch.device) -> Wanted:
        """The same on a device."""
        return Wanted(self.states.to(device), None if self.output is None else self.output.to(device))

    def importance(self) -> torch.Tensor:
        """w [n, T, 1]: errors count as the next norm sees them, and the one between, if any."""
        share = importance(self.states)
        return share if self.output is None else share * importance(self.output)


class _Seen(Exception):  # noqa: N818 (nothing went wrong)
    """The inputs are known; the rest need not run."""


def readers_of(shape: ModelShape, positions: Sequence[int], block: nn.Module) -> list[Reader]:
    """Readers of one block in the order in which they run: all attentions stand before the FFN."""
    scale = float(getattr(block, "residual_multiplier", 1.0))

    def reader(position: int, name: str, entry: str, post_norm: str | None, groups: int | None) -> Reader:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return Reader(
            name=f"{shape.place(position)[1]}.{name}.weight",
            position=position,
            linear=linear,
            entry=block.get_submodule(entry),
            ffn=block.get_submodule(name.rpartition(".")[0]) if groups is None else None,
            groups=groups,
            post_norm=block.get_submodule(post_norm) if post_norm else None,
            scale=scale,
        )

    sites = [(position, shape.place(position)[0]) for position in positions]
    attentions = [
        reader(p, site.o, site.input_norm or site.q, site.attention_post_norm, shape.layers[p].kv_heads)
        for p, site in sites
    ]
    ffns = [
        reader(p, site.ffn_down, site.ffn_norm or site.ffn_down.rpartition(".")[0], site.ffn_post_norm, None)
        for p, site in sites
        if site.ffn_rows
    ]
    return attentions + ffns


def importance(states: torch.Tensor) -> torch.Tensor:
    """The inverse size [n, T, 1] of states [n, T, D]."""
    return states.square().mean(-1, keepdim=True).clamp_min(_TINY).rsqrt()


def up_to(reader: Reader, run: Callable[[], object]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run as far as a reader: (the hidden states [n, T, D] it adds to, its inputs [n, T, k])."""
    seen: list[torch.Tensor] = []

    def last(inputs: torch.Tensor) -> None:
        seen.append(inputs)
        raise _Seen

    with watched(reader.entry, seen.append), watched(reader.linear, last), suppress(_Seen):
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
