"""Write a pruned checkpoint: an ordinary Hugging Face folder.

When layers differ, config.json carries transformers' ``per_layer_config`` and an ``auto_map`` to the module
copied beside the weights, so ``from_pretrained(folder, trust_remote_code=True)`` works with transformers
alone; the global numbers stay the dense model's. When layers are alike (allocation ``uniform``) and a class
of transformers takes them, the config is a stock one; the family says how (``families/llama.py``).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nirvana_deploy.base.artifact import whole_folder, write_json
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import disk_errors, require_free_bytes
from nirvana_deploy.model import modeling_nirvana
from nirvana_deploy.model.checkpoint import Checkpoint, copy_companions
from nirvana_deploy.model.families import family_of
from nirvana_deploy.model.family import Family
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weight_files import INDEX_FILE
from nirvana_deploy.model.weights import JoinedWeights, SafetensorsWeights, WeightSource, stored_shapes
from nirvana_deploy.prune.plan import PrunePlan, pruned_shape
from nirvana_deploy.prune.slicing import ReplacedWeights, SlicedWeights

DEFAULT_SHARD_BYTES = 1_000_000_000
_NOT_INHERITED = (
    "_name_or_path",
    "_model_name_or_path",
    "allow_global_per_layer_attribute_access",
    "auto_map",
    "per_layer_config",
)
"""What the dense config may say that is not true of the pruned model, or is said anew."""


def slice_checkpoint(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    out: Path,
    *,
    reconstruction: Path | None = None,
    recovery: Path | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = SILENT,
) -> ModelShape:
    """Cut the plan's units out of ``checkpoint`` and write the result to the folder ``out``.

    What ``reconstruct_layers`` wrote to the folder ``reconstruction`` takes the place of the plain cut, and
    what training wrote to the folder ``recovery`` the place of both.
    The source is not touched; ``out`` appears whole or not at all. Memory is bounded by one shard of
    ``shard_bytes`` and one tensor. Returns the shape of what was written; its ``family`` is that of the
    config written, which is Mistral where a uniform Llama had to be relabelled (a note says so too).
    """
    shape = checkpoint.shape
    smaller = pruned_shape(shape, plan)
    weights: WeightSource = SlicedWeights(checkpoint.weights, shape, plan)
    if reconstruction is not None:
        weights = ReplacedWeights(weights, SafetensorsWeights(reconstruction))
    weights = JoinedWeights(weights, smaller)
    if recovery is not None:
        weights = ReplacedWeights(weights, SafetensorsWeights(recovery))
    shards = _shards(weights, list(stored_shapes(smaller)), shard_bytes)
    total_bytes = sum(_bytes(weights, name) for shard in shards for name in shard)
    require_free_bytes(out, total_bytes, what="The pruned checkpoint")
    written = pruned_config(checkpoint.config, plan, shape)
    family = family_of(written)
    if family != shape.family:
        progress.note(
            f"config.json says {family.architecture}: the same function as {shape.family.architecture}, "
            f"whose config refuses {smaller.layers[0].query_heads} heads "
            f"for a hidden size of {shape.hidden_size}."
        )
    with whole_folder(out) as folder, disk_errors(out):
        with progress.task("Slicing weights", len(shards)) as advance:
            _write_shards(weights, shards, folder, total_bytes, advance)
        write_json(folder / "config.json", written)
        if "auto_map" in written:
            shutil.copyfile(Path(modeling_nirvana.__file__), folder / "modeling_nirvana.py")
        copy_companions(checkpoint.path, folder)
    return replace(smaller, family=family)


def pruned_config(config: dict[str, Any], plan: PrunePlan, shape: ModelShape) -> dict[str, Any]:
    """``config.json`` of the pruned model, from that of the dense one; stock where the plan is uniform."""
    smaller, family = pruned_shape(shape, plan), shape.family
    kept = {key: value for key, value in config.items() if key not in _NOT_INHERITED}
    if plan.allocation == "uniform" and (stock := family.stock_config(kept, smaller)) is not None:
        return stock
    widths = _pruned_layers(config, plan) if family.shares_position_bias else _per_layer_widths(smaller)
    return kept | _own_classes(family) | widths


def _own_classes(family: Family) -> dict[str, Any]:
    """Where the code for layers that differ lies."""
    return {
        "architectures": [family.own_architecture],
        "auto_map": {
            "AutoConfig": f"modeling_nirvana.{family.own_config_class}",
            family.auto_class: f"modeling_nirvana.{family.own_architecture}",
        },
    }


def _per_layer_widths(smaller: ModelShape) -> dict[str, Any]:
    """Widths of a model whose layers differ, in transformers' own words."""
    digits = len(str(len(smaller.layers) - 1))
    return {
        "head_dim": smaller.head_dim,
        **dict(smaller.family.own_settings),
        "per_layer_config": {
            str(index).zfill(digits): {
                "num_attention_heads": layer.query_heads,
                "num_key_value_heads": layer.kv_heads,
                "intermediate_size": layer.ffn_width,
            }
            for index, layer in enumerate(smaller.layers)
        },
    }


def _pruned_layers(config: dict[str, Any], plan: PrunePlan) -> dict[str, Any]:
    """What every layer kept: site -> layer -> heads (of the dense model) and FFN width.

    The indices of the heads matter after the cut too: all layers read their own columns of one shared
    position bias. Cutting a pruned model again composes the two.
    """
    before = config.get("pruned_layers")
    layers: dict[str, list[dict[str, Any]]] = {}
    for layer in plan.layers:
        heads = before[layer.site][layer.layer]["kept_heads"] if before else range(layer.of_groups)
        kept = {"kept_heads": [heads[group] for group in layer.kept_groups], "d_ff": len(layer.kept_neurons)}
        layers.setdefault(layer.site, []).append(kept)
    return {"pruned_layers": layers}


def _bytes(weights: WeightSource, name: str) -> int:
    return int(torch.Size(weights.shape(name)).numel()) * weights.dtype(name).itemsize


def _shards(weights: WeightSource, names: Sequence[str], shard_bytes: int) -> list[list[str]]:
    """Split ``names`` in order into shards of at most ``shard_bytes`` (a larger tensor stands alone)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        if shards[-1] and size + _bytes(weights, name) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(weights, name)
    return shards


def _shard_files(count: int) -> Iterator[str]:
    if count == 1:
        yield "model.safetensors"
    else:
        yield from (f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1))


def _write_shards(
    weights: WeightSource, shards: list[list[str]], folder: Path, total_bytes: int, advance: Any
) -> None:
    weight_map: dict[str, str] = {}
    for file, names in zip(_shard_files(len(shards)), shards, strict=True):
        tensors = {name: weights.load(name) for name in names}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # its writer wraps the system's "no space left" and the like
            raise OSError(str(error)) from error
        weight_map.update(dict.fromkeys(names, file))
        advance(1)
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
