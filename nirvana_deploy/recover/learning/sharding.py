"""A model in parts among processes: torch's ``fully_shard`` (FSDP2), as ``accelerate launch`` asks for it.

Of each layer every process holds a part of the weights, of their gradients and moments; a layer is whole
while it computes. The student is set up by accelerate, the layers of a teacher in memory here. What is saved
and kept is whole, and written by the first process.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from nirvana_deploy.prune.streaming.loading import compute_device
from nirvana_deploy.prune.streaming.processes import count

WEIGHTS = "pytorch_model_fsdp.bin"
"""What accelerate calls the weights of a model in parts, in a saved state."""


def is_asked_for() -> bool:
    """Whether the launcher says FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def is_sharded() -> bool:
    """Whether each process has a part of the model."""
    return is_asked_for() and count() > 1


def plugin_for(model: nn.Module, *, bfloat16: bool) -> Any:
    """What accelerate is told, beside what the launcher says: a unit for each layer of ``model``.

    In bfloat16 weights are gathered in it and gradients summed in float32; parts, moments and what runs from
    layer to layer stay in float32, as under autocast.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=_layer_classes(model),
        state_dict_type="FULL_STATE_DICT",
        backward_prefetch="NO_PREFETCH",  # has no meaning for FSDP2, and is warned of
        cpu_ram_efficient_loading=False,  # each process reads the files itself
        mixed_precision_policy=_precision(bfloat16),
    )


def widened(model: Any) -> Any:
    """``model``, whose layers are handed float32 also where its embedding is gathered in bfloat16."""
    table = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is table:
            module.register_forward_hook(lambda module, inputs, states: states.float())
    return model


def let_cpu_take_part(accelerator: Any, plugin: Any) -> None:
    """Give an accelerator of CPU processes the plugin, in place: accelerate gives it to those of GPUs alone.

    ``fully_shard`` itself knows gloo, and what runs from here on is what runs on GPUs.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # the one that later states copy, and this one
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin


def share_layers(model: nn.Module, *, bfloat16: bool) -> None:
    """Put the layers of a model that is not trained in parts, and the rest on the device, in place."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    names = _layer_classes(model)
    for layer in [one for one in model.modules() if type(one).__name__ in names]:
        fully_shard(layer, reshard_after_forward=True, mp_policy=_precision(bfloat16))
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(compute_device())


def gathered(model: nn.Module) -> dict[str, Any]:
    """All weights by name, whole, on the CPU of the first process; none in others, which ask for them too."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _layer_classes(model: nn.Module) -> list[str]:
    """Names of the classes of which each object is a layer, as transformers tells them."""
    layers = {name for one in model.modules() for name in getattr(one, "_no_split_modules", None) or ()}
    return sorted(layers & {type(one).__name__ for one in model.modules()})


def _precision(bfloat16: bool) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    dtype = torch.bfloat16 if bfloat16 else None
    reduced = torch.float32 if bfloat16 else None
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
