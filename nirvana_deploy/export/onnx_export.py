"""Export a checkpoint to an ONNX folder: graphs, one external-data file, tokenizer, consumers' configs.

Weights stream (``streaming.py``): a graph holds names; each tensor is read, converted, transposed for MatMul
and written a block at a time, so peak memory is a few blocks whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import GenerationConfig

from nirvana_deploy.base.artifact import whole_folder, write_json
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import disk_errors, require_free_bytes
from nirvana_deploy.export.attention import Rotary
from nirvana_deploy.export.decoder import GraphOptions, build_decoder
from nirvana_deploy.export.dtypes import DTYPES, dtype_named
from nirvana_deploy.export.encoder_decoder import (
    Weights,
    build_cached_decoder,
    build_encoder,
    recipe_from_config,
)
from nirvana_deploy.export.genai import genai_config
from nirvana_deploy.export.streaming import streamed_parameters
from nirvana_deploy.model.checkpoint import Checkpoint, copy_companions
from nirvana_deploy.model.config import limited
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.output.layout import DATA_FILE, DECODER_FILE, ENCODER_FILE, MODEL_FILE

_ALIGNMENT_BYTES = 4096  # a page: runtimes can map large tensors straight from the file


@dataclass(frozen=True)
class OnnxFolder:
    """An exported model."""

    path: Path
    shape: ModelShape
    options: GraphOptions
    weights_bytes: int
    """Size of the external-data file."""
    nodes: int

    def __repr__(self) -> str:
        return (
            f"OnnxFolder({str(self.path)!r}, {self.nodes:,} nodes, {self.weights_bytes:,} bytes of weights)"
        )


def onnx_from_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str = "fp32",
    flavor: str = "portable",
    cache_tokens: int | None = None,
    last_logits: bool = False,
    progress: Progress = SILENT,
) -> OnnxFolder:
    """Export a checkpoint, dense or pruned, to the ONNX folder ``out``.

    ``dtype`` is "fp32", "fp16" or "bf16" (``dtypes.py`` says what stays float32 inside), ``flavor``
    "portable", "gqa" or "static-cache" (``decoder.py``), the last with a cache of ``cache_tokens`` slots;
    ``last_logits`` keeps the logits of the last position only.

    ``out`` appears whole or not at all, and replaces what was there. Raises NirvanaError for an
    architecture that these options are not for, weights that do not fit the dtype, or a disk without room.
    """
    options = GraphOptions(
        dtype=dtype_named(dtype), flavor=flavor, cache_tokens=cache_tokens, last_logits=last_logits
    )
    shape = checkpoint.shape
    options.require_fits(shape)
    parameters = shape.linear_parameters + shape.embedding_parameters
    require_free_bytes(out, options.dtype.element_bytes * parameters, what="The ONNX export")
    graphs = _graphs(checkpoint, options)
    count = sum(len(graph.graph.initializers) for graph in graphs.values())
    with whole_folder(out) as folder, progress.task("Writing ONNX weights", count) as advance:
        if len(graphs) == 1:
            _save(graphs[MODEL_FILE], folder / MODEL_FILE, advance)
        else:
            _save_sharing_weights(graphs, folder, advance)
        for name, settings in _consumer_configs(checkpoint, options).items():
            write_json(folder / name, settings)
        copy_companions(checkpoint.path, folder)
    return OnnxFolder(
        path=out,
        shape=shape,
        options=options,
        weights_bytes=(out / DATA_FILE).stat().st_size,
        nodes=sum(graph.graph.num_nodes() for graph in graphs.values()),
    )


def _graphs(checkpoint: Checkpoint, options: GraphOptions) -> dict[str, ir.Model]:
    """File name -> graph, whose weights are read when they are written."""
    config, shape = checkpoint.pretrained_config, checkpoint.shape
    narrow = streamed_parameters(checkpoint.multiplied_weights, options.dtype)
    if len(shape.family.stacks) == 1:
        decoder = build_decoder(
            shape,
            options,
            computation=checkpoint.computation,
            rotaries=_rotaries(checkpoint),
            norm_epsilon=config.rms_norm_eps,
            max_positions=checkpoint.context_tokens or config.max_position_embeddings,
            parameter=narrow,
        )
        return {MODEL_FILE: decoder}
    recipe = recipe_from_config(config, shape)
    wide = streamed_parameters(checkpoint.weights, DTYPES["fp32"])
    sources = Weights(dtype=options.dtype, narrow=narrow, wide=wide)
    return {
        ENCODER_FILE: build_encoder(shape, recipe, sources),
        DECODER_FILE: build_cached_decoder(shape, recipe, sources),
    }


def _rotaries(checkpoint: Checkpoint) -> dict[str, Rotary]:
    """Kind of a layer -> its rotary embedding."""
    rotaries = {}
    for kind in checkpoint.computation.rotary_kinds:
        frequencies, scaling = checkpoint.rotary_frequencies(kind)
        rotaries[kind] = Rotary(inverse_frequencies=frequencies.numpy(), scaling=scaling)
    return rotaries


def _consumer_configs(checkpoint: Checkpoint, options: GraphOptions) -> dict[str, dict[str, Any]]:
    """File name -> what other programs read beside the graphs.

    optimum and transformers.js read ``config.json``: for a decoder it is written where one shape fits all
    layers; for an encoder-decoder always, naming the class of transformers and no code.
    """
    config, family = checkpoint.pretrained_config, checkpoint.shape.family
    found: dict[str, dict[str, Any]] = {}
    if family.genai_type is not None and options.flavor != "static-cache":  # which it cannot drive
        found["genai_config.json"] = genai_config(
            checkpoint.path,
            checkpoint.shape,
            filename=MODEL_FILE,
            context_tokens=checkpoint.context_tokens or config.max_position_embeddings,
            flavor=options.flavor,
        )
    if len(family.stacks) == 1:
        if "auto_map" not in checkpoint.config:
            found["config.json"] = limited(checkpoint.config, checkpoint.context_tokens)
        return found
    found["config.json"] = {**config.to_dict(), "architectures": [family.architecture]}
    found["config.json"].pop("auto_map", None)
    if not (checkpoint.path / "generation_config.json").is_file():
        found["generation_config.json"] = GenerationConfig.from_model_config(config).to_diff_dict()
    return found


def _save(model: ir.Model, path: Path, advance: Callable[[int], None]) -> None:
    with disk_errors(path):
        ir.save(
            model,
            path,
            external_data=DATA_FILE,
            alignment=_ALIGNMENT_BYTES,
            max_workers=1,
            callback=lambda tensor, info: advance(1),
        )


def _save_sharing_weights(
    models: Mapping[str, ir.Model], folder: Path, advance: Callable[[int], None]
) -> None:
    """Write ``models`` into ``folder``; weights of one name are stored once, in DATA_FILE.

    Encoder and decoder both look tokens up in the embedding, which a tied head reads once more: a runtime
    that maps the file holds its pages once for all of them.
    """
    holders: dict[str, list[ir.Value]] = {}
    for model in models.values():
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.LazyTensor):
                holders.setdefault(name, []).append(value)
    with disk_errors(folder):
        stored = ir.external_data.convert_tensors_to_external(
            [values[0].const_value for values in holders.values() if values[0].const_value is not None],
            folder,
            DATA_FILE,
            alignment=_ALIGNMENT_BYTES,
            max_workers=1,
            callback=lambda tensor, info: advance(1),
        )
        for values, tensor in zip(holders.values(), stored, strict=True):
            for value in values:
                value.const_value = tensor
        for name, model in models.items():
            ir.save(model, folder / name)
