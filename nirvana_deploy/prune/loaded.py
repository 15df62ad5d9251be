"""A module that has weights for a while: what streaming is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nirvana_deploy.model.weights import WeightSource


@contextmanager
def loaded(module: nn.Module, weights: WeightSource, *, prefix: str) -> Iterator[nn.Module]:
    """Give ``module``, which lives on the meta device, its float32 weights; afterwards they take no memory.

    Tensors are those of ``weights`` under ``prefix``. They may be narrower than the module was made for,
    where its code reads widths off the weights.
    """
    for name in module.state_dict():
        place, _, parameter = name.rpartition(".")
        tensor = weights.load(f"{prefix}.{name}").to(torch.float32)
        setattr(module.get_submodule(place), parameter, nn.Parameter(tensor))
    try:
        yield module
    finally:
        module.to("meta")
        module.zero_grad(set_to_none=True)
