"""A module that has weights for a while, on the GPU where there is one: what streaming is made of.

One layer is on the device at a time; what lasts (hidden states, scores) comes home to the CPU. The way to
a GPU and back is tested for consistency only: it has never been run on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from nirvana_deploy.model.weights import WeightSource

CPU = torch.device("cpu")
Runs = Sequence[Callable[[], torch.Tensor]]
"""One layer on each micro-batch of what entered it: what leaves it, [n, T, D]."""
LayerVisit = Callable[[Sequence[int], nn.Module, Runs, Runs], tuple[list[torch.Tensor], list[torch.Tensor]]]
"""(positions in ``shape.layers``, the module with their weights, runs of it in the dense model and in the one
that is being made) -> what leaves it in both."""


def compute_device() -> torch.device:
    """Where layers are run: a GPU that torch sees, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


def home(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU; itself when it is there."""
    return tensor.to(CPU)


def micro_batches(tokens: torch.Tensor, sequences: int) -> list[torch.Tensor]:
    """``tokens`` [N, T] as views [n, T] of at most ``sequences``."""
    return [tokens[start : start + sequences] for start in range(0, len(tokens), sequences)]


@contextmanager
def loaded(
    module: nn.Module, weights: WeightSource, *, prefix: str, device: torch.device = CPU
) -> Iterator[nn.Module]:
    """Give ``module``, which lives on the meta device, its float32 weights; afterwards they take no memory.

    Tensors are those of ``weights`` under ``prefix``. They may be narrower than the module was made for,
    where its code reads widths off the weights.
    """
    for name in module.state_dict():
        place, _, parameter = name.rpartition(".")
        tensor = weights.load(f"{prefix}.{name}").to(device, torch.float32)
        setattr(module.get_submodule(place), parameter, nn.Parameter(tensor))
    try:
        yield module
    finally:
        module.to("meta")
        module.zero_grad(set_to_none=True)
