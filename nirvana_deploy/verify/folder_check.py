"""What can be said of an ONNX folder before anything is computed: is it whole, and of this checkpoint.

Everything here reads the graph and sizes of files, no weights. Each problem is an error of its own that says
what to do; the first one ends the check.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import onnx

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import config_json
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.family import DECODER
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.snapshot import lies_within
from nirvana_deploy.output.layout import DECODER_FILE, ENCODER_FILE, MODEL_FILE, SCHEMA_KEY, require_schema
from nirvana_deploy.runtime.openvino.ir import refuse_ir

CHECKED = "ONNX checker, external data, KV shapes, tokenizer"
"""What :func:`check_folder` looks at, in words."""


def check_folder(folder: Path, checkpoint: Path) -> None:
    """Raise NirvanaError unless ``folder`` holds a whole model with the dimensions of ``checkpoint``."""
    path = folder / MODEL_FILE
    if (folder / ENCODER_FILE).is_file():
        check_graph_file(folder / ENCODER_FILE)
        path = folder / DECODER_FILE
    check_graph_file(path)
    graph = onnx.load(path, load_external_data=False).graph
    _check_cache(path, graph, shape_from_config(config_json(checkpoint)))
    tokenizer = "tokenizer.json"
    if (checkpoint / tokenizer).is_file() and not (folder / tokenizer).is_file():
        raise NirvanaError(
            f"{folder} has no {tokenizer}, and its checkpoint has one: runtimes would miss it.",
            hint=f"Copy it there: cp {checkpoint / tokenizer} {folder}",
        )


def check_graph_file(path: Path) -> None:
    """Raise NirvanaError unless ``path`` is a valid ONNX file of a known schema, its weights beside it."""
    folder = path.parent
    again = f"Export it again: nirvana-deploy export CHECKPOINT --out {folder}"
    refuse_ir(folder)
    if not path.is_file():
        raise NirvanaError(
            f"{folder} holds no {path.name}.", hint="nirvana-deploy export CHECKPOINT --out DIR"
        )
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors have no common base class
        raise NirvanaError(f"{path} is not an ONNX file, or is cut short: {error}.", hint=again) from error
    require_schema(path, {entry.key: entry.value for entry in model.metadata_props}.get(SCHEMA_KEY))
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, tensor, again)
    try:
        onnx.checker.check_model(_without_weights(model), full_check=False)
    except onnx.checker.ValidationError as error:
        raise NirvanaError(f"{path} is not a valid ONNX model: {error}", hint=again) from error


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its external weights as inputs: their bytes are checked here, links of a cache too."""
    graph = model.graph
    external = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        graph.initializer.remove(tensor)
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def _check_external(path: Path, tensor: onnx.TensorProto, again: str) -> None:
    """One weight's bytes lie in a file of the folder, all of them."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    inside = not PurePosixPath(location).is_absolute() and ".." not in PurePosixPath(location).parts
    data = path.parent / location
    if not inside or not lies_within(data, path.parent):
        raise NirvanaError(
            f"{path}: the weights of {tensor.name!r} point to {location!r}, outside of the model's folder; "
            "such a file is refused.",
            hint=f"Put the weights beside {path.name}. {again}",
        )
    if not data.is_file():
        raise NirvanaError(
            f"{path} keeps its weights in {location}, which is missing beside it.",
            hint=f"Move both files together. {again}",
        )
    end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    if data.stat().st_size < end:
        raise NirvanaError(
            f"{data} has {data.stat().st_size} bytes, {tensor.name!r} ends at byte {end}: it is cut short.",
            hint=again,
        )


def _check_cache(path: Path, graph: onnx.GraphProto, shape: ModelShape) -> None:
    """Every layer's cache inputs have the KV heads and the head_dim of the checkpoint's config."""
    found = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    sites = {DECODER: "decoder.", "cross": "encoder."} if shape.family.encoder_decoder else {DECODER: ""}
    for site, part in sites.items():
        _check_caches_of(path, found, shape, site=site, part=part)


def _check_caches_of(
    path: Path, found: Mapping[str, Any], shape: ModelShape, *, site: str, part: str
) -> None:
    """Those of one site, named ``past_key_values.{layer}.{part}key|value``."""
    layers = [layer for layer in shape.layers if layer.site == site]
    beyond = f"past_key_values.{len(layers)}.{part}key"
    if beyond in found:
        raise NirvanaError(f"{path} has more layers than the {len(layers)} of its checkpoint.")
    for index, layer in enumerate(layers):
        for kind in ("key", "value"):
            name = f"past_key_values.{index}.{part}{kind}"
            if name not in found:
                raise NirvanaError(f"{path} has no input {name}; its checkpoint has {len(layers)} layers.")
            heads, head_dim = found[name][1].dim_value, found[name][3].dim_value
            if (heads, head_dim) != (layer.kv_heads, shape.head_dim):
                raise NirvanaError(
                    f"{path}: {name} holds {heads} KV heads of {head_dim} numbers, its checkpoint "
                    f"{layer.kv_heads} of {shape.head_dim}: they are not of the same cut.",
                    hint="Export the checkpoint again, or name the one that this graph was made from.",
                )
