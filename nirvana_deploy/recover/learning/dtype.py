"""The dtype of the products of a training, its measured KL included; weights and moments stay in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from nirvana_deploy.base.machine import cpu_multiplies_bfloat16
from nirvana_deploy.prune.streaming.loading import compute_device
from nirvana_deploy.recover.recipe import AUTO, BFLOAT16, Recovery


def in_bfloat16(recipe: Recovery) -> bool:
    """Whether this process's device is to compute in bfloat16; ``auto`` asks whether it is faster in it."""
    if recipe.recover_method == "layers":
        return False
    return _faster() if recipe.recover_dtype == AUTO else recipe.recover_dtype == BFLOAT16


def computing(bfloat16: bool) -> AbstractContextManager[object]:
    """The context in which a step computes."""
    return torch.autocast(compute_device().type, dtype=torch.bfloat16, enabled=bfloat16)


def _faster() -> bool:
    """Whether the device multiplies in bfloat16 itself; what a CPU emulates is slower than float32."""
    if compute_device().type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_multiplies_bfloat16()
