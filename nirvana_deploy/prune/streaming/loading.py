"""Load one module's weights, run it, free them; on the GPU if torch sees one.

One module is on the device at a time; hidden states and scores stay on the CPU. The way to a GPU and back is
tested for consistency only: it has never run on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nirvana_deploy.model.weights import WeightSource

CPU = torch.device("cpu")


def compute_device() -> torch.device:
    """A GPU that torch sees, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


@contextmanager
def loaded(
    module: nn.Module, weights: WeightSource, *, prefix: str, device: torch.device = CPU
) -> Iterator[nn.Module]:
    """Give ``module``, which lives on the meta device, float32 weights; free them and their gradients after.

    The tensors are those of ``weights`` under ``prefix``. They may be narrower than the module was made for
    if its code reads widths off the weights.
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
