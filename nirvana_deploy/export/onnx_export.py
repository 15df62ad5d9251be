"""From a checkpoint folder to an ONNX folder: graph, one external-data file, tokenizer, genai_config.

Weights stream: the graph holds names, and each tensor is read, transposed where a MatMul wants it so,
written and dropped, so peak memory is a few tensors whatever the depth.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from nirvana_deploy.artifact import disk_errors, require_free_bytes, whole_folder, write_json
from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.export import DATA_FILE, MODEL_FILE
from nirvana_deploy.export.genai import genai_config
from nirvana_deploy.export.graph import Rotary, build_decoder
from nirvana_deploy.model.checkpoint import TOKENIZER_FILES, read_config
from nirvana_deploy.model.rope import rotary_frequencies
from nirvana_deploy.model.shape import ModelShape, shape_from_config
from nirvana_deploy.model.weights import SafetensorsWeights, WeightSource, check_weights
from nirvana_deploy.progress import SILENT, Progress

_ALIGNMENT_BYTES = 4096  # a page: runtimes can map large tensors straight from the file


@dataclass(frozen=True)
class OnnxFolder:
    """An exported decoder."""

    path: Path
    shape: ModelShape
    weights_bytes: int
    """Size of the external-data file."""
    nodes: int


def onnx_from_checkpoint(checkpoint: Path, out: Path, *, progress: Progress = SILENT) -> OnnxFolder:
    """Export a checkpoint folder (dense or pruned), float32, to the ONNX folder ``out``.

    ``out`` appears whole or not at all, and replaces what was there. Raises NirvanaError for an
    unsupported architecture, weights that do not fit the config, or a disk without room.
    """
    config = read_config(checkpoint)
    shape = shape_from_config(config.to_dict())
    require_exportable(shape)
    weights = SafetensorsWeights(checkpoint)
    check_weights(weights, shape)
    require_free_bytes(
        out, 4 * (shape.linear_parameters + shape.embedding_parameters), what="The ONNX export"
    )
    frequencies, scaling = rotary_frequencies(config, head_dim=shape.head_dim)
    model = build_decoder(
        shape,
        rotary=Rotary(inverse_frequencies=frequencies.numpy(), scaling=scaling),
        norm_epsilon=config.rms_norm_eps,
        parameter=_streamed(weights),
    )
    count = len(model.graph.initializers)
    with whole_folder(out) as folder, progress.task("Writing ONNX weights", count) as advance:
        _save(model, folder / MODEL_FILE, advance)
        write_json(folder / "genai_config.json", genai_config(config, shape, filename=MODEL_FILE))
        for name in TOKENIZER_FILES:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, folder / name)
    return OnnxFolder(
        path=out,
        shape=shape,
        weights_bytes=(out / DATA_FILE).stat().st_size,
        nodes=model.graph.num_nodes(),
    )


def require_exportable(shape: ModelShape) -> None:
    """Raise NirvanaError for a family that can be pruned and not exported yet."""
    if shape.family.encoder_decoder:
        raise NirvanaError(
            f"Encoder-decoder models ({shape.family.name}) cannot be exported to ONNX yet, only pruned.",
            hint="nirvana-deploy prune MODEL writes plan.json and a checkpoint that transformers loads.",
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


def _streamed(weights: WeightSource) -> Callable[[str, tuple[int, ...], bool], ir.TensorProtocol]:
    """Parameters that read themselves from ``weights`` when they are written."""

    def parameter(name: str, shape: tuple[int, ...], transposed: bool) -> ir.TensorProtocol:
        def read() -> ir.TensorProtocol:
            tensor = weights.load(name).to(torch.float32)
            array = (tensor.T if transposed else tensor).contiguous().numpy()
            if array.shape != shape:
                raise NirvanaError(
                    f"Tensor {name!r}: the graph asks for {shape}, the file has {array.shape}."
                )
            return ir.Tensor(array, name=name)

        return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)

    return parameter
