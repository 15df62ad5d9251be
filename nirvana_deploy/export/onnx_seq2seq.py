"""The two graphs of an encoder-decoder as files of one folder that share one external-data file.

Encoder and decoder both look tokens up in the embedding, which a tied head reads once more: it lies on disk
once, and a runtime that maps the file holds its pages once for both sessions. ``config.json`` lies beside
the graphs, since optimum and transformers.js read it; it names transformers' own class and no code.

These files ran on random weights only: in ONNX Runtime and transformers.js 4.3, dense and pruned, and in
optimum-onnx 0.1, which makes the empty cache of the first step from config.json and so takes dense models
whose num_heads x d_kv is d_model. onnxruntime-genai 0.18 knows no T5: there is no genai_config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import GenerationConfig, PreTrainedConfig

from nirvana_deploy.base.artifact import disk_errors, write_json
from nirvana_deploy.export.dtypes import DTYPES, Dtype
from nirvana_deploy.export.encoder_decoder import (
    Weights,
    build_cached_decoder,
    build_encoder,
    recipe_from_config,
)
from nirvana_deploy.export.streaming import streamed_parameters
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import WeightSource
from nirvana_deploy.output.layout import DATA_FILE, DECODER_FILE, ENCODER_FILE


def seq2seq_graphs(
    config: PreTrainedConfig, shape: ModelShape, weights: WeightSource, *, dtype: Dtype
) -> dict[str, ir.Model]:
    """File name -> graph of encoder and decoder, whose weights are read when they are written."""
    recipe = recipe_from_config(config, shape)
    wide = streamed_parameters(weights, DTYPES["fp32"])
    sources = Weights(dtype=dtype, narrow=streamed_parameters(weights, dtype), wide=wide)
    return {
        ENCODER_FILE: build_encoder(shape, recipe, sources),
        DECODER_FILE: build_cached_decoder(shape, recipe, sources),
    }


def save_sharing_weights(
    models: Mapping[str, ir.Model], folder: Path, *, alignment: int, advance: Callable[[int], None]
) -> None:
    """Write ``models`` into ``folder``; initializers of one name are stored once, in DATA_FILE."""
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
            alignment=alignment,
            max_workers=1,
            callback=lambda tensor, info: advance(1),
        )
        for values, tensor in zip(holders.values(), stored, strict=True):
            for value in values:
                value.const_value = tensor
        for name, model in models.items():
            ir.save(model, folder / name)


def write_consumer_configs(config: PreTrainedConfig, checkpoint: Path, folder: Path) -> None:
    """``config.json`` and ``generation_config.json`` beside the graphs, where the checkpoint's do not fit."""
    written: dict[str, Any] = config.to_dict()
    written["architectures"] = ["T5ForConditionalGeneration"]
    written.pop("auto_map", None)
    write_json(folder / "config.json", written)
    if not (checkpoint / "generation_config.json").is_file():
        write_json(
            folder / "generation_config.json", GenerationConfig.from_model_config(config).to_diff_dict()
        )
