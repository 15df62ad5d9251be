"""From a checkpoint folder to an ONNX folder: graphs, one external-data file, tokenizer, consumers' configs.

Weights stream (``streaming.py``): the graph holds names, and each tensor is read, converted, transposed where
a MatMul wants it so, and written a block at a time, so peak memory is a few blocks whatever the depth.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from transformers import PreTrainedConfig

from nirvana_deploy.base.artifact import disk_errors, require_free_bytes, whole_folder, write_json
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.export.attention import Rotary
from nirvana_deploy.export.decoder import GraphOptions, build_decoder
from nirvana_deploy.export.dtypes import dtype_named
from nirvana_deploy.export.genai import genai_config
from nirvana_deploy.export.onnx_seq2seq import save_sharing_weights, seq2seq_graphs, write_consumer_configs
from nirvana_deploy.export.streaming import streamed_parameters
from nirvana_deploy.model.checkpoint import TOKENIZER_FILES, Checkpoint
from nirvana_deploy.model.rope import rotary_frequencies
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import WeightSource
from nirvana_deploy.output.layout import DATA_FILE, MODEL_FILE

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
    "portable", "gqa" or "static-cache" (``graph.py``), the last with a cache of ``cache_tokens`` slots;
    ``last_logits`` keeps the logits of the last position only.

    ``out`` appears whole or not at all, and replaces what was there. Raises NirvanaError for an
    architecture that these options are not for, weights that do not fit the dtype, or a disk without room.
    """
    options = GraphOptions(
        dtype=dtype_named(dtype), flavor=flavor, cache_tokens=cache_tokens, last_logits=last_logits
    )
    config, shape, weights = checkpoint.pretrained_config, checkpoint.shape, checkpoint.weights
    options.require_fits(shape)
    parameters = shape.linear_parameters + shape.embedding_parameters
    require_free_bytes(out, options.dtype.element_bytes * parameters, what="The ONNX export")
    if shape.family.encoder_decoder:
        models = seq2seq_graphs(config, shape, weights, dtype=options.dtype)
    else:
        models = {MODEL_FILE: _decoder_graph(config, shape, weights, options)}
    count = sum(len(model.graph.initializers) for model in models.values())
    with whole_folder(out) as folder, progress.task("Writing ONNX weights", count) as advance:
        if shape.family.encoder_decoder:
            save_sharing_weights(models, folder, alignment=_ALIGNMENT_BYTES, advance=advance)
            write_consumer_configs(config, checkpoint.path, folder)
        else:
            _save(models[MODEL_FILE], folder / MODEL_FILE, advance)
            if options.flavor != "static-cache":  # which onnxruntime-genai cannot drive
                settings = genai_config(config, shape, filename=MODEL_FILE, flavor=flavor)
                write_json(folder / "genai_config.json", settings)
            if "auto_map" not in checkpoint.config:  # one shape in all layers
                write_json(folder / "config.json", checkpoint.config)
        for name in TOKENIZER_FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, folder / name)
    return OnnxFolder(
        path=out,
        shape=shape,
        options=options,
        weights_bytes=(out / DATA_FILE).stat().st_size,
        nodes=sum(model.graph.num_nodes() for model in models.values()),
    )


def _decoder_graph(
    config: PreTrainedConfig, shape: ModelShape, weights: WeightSource, options: GraphOptions
) -> ir.Model:
    frequencies, scaling = rotary_frequencies(config, head_dim=shape.head_dim)
    return build_decoder(
        shape,
        options,
        rotary=Rotary(inverse_frequencies=frequencies.numpy(), scaling=scaling),
        norm_epsilon=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        parameter=streamed_parameters(weights, options.dtype),
    )


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
