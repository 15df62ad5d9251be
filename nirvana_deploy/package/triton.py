"""A Triton model repository from an ONNX folder: its graph, and a model that generates text with it.

```
REPOSITORY/NAME/1/model.py            decode loop on onnxruntime-genai (triton_decode.py): text in and out
REPOSITORY/NAME-graph/1/model.onnx/   the ONNX folder, one step of the decoder: KV cache in and out
```
The loop reads the weights from its neighbour, so they lie there once. Triton finds an ONNX model with
external data only where ``model.onnx`` is a folder [Triton, model_repository.md].
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from nirvana_deploy.base.artifact import files_under, whole_folder
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import require_free_bytes
from nirvana_deploy.output.layout import MODEL_FILE
from nirvana_deploy.package import triton_decode
from nirvana_deploy.verify.folder_check import check_graph_file

VERSION = "1"
_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class TritonTensor:
    """An input or output of a served model."""

    name: str
    data_type: str
    """TYPE_FP32, TYPE_STRING, ..."""
    dims: tuple[int, ...]
    """-1 where it varies; the batch dimension is among them, since ``max_batch_size`` is 0."""
    optional: bool = False


TEXT_INPUTS = (
    TritonTensor("text_input", "TYPE_STRING", (1,)),
    TritonTensor("max_tokens", "TYPE_INT32", (1,), optional=True),
    TritonTensor("stream", "TYPE_BOOL", (1,), optional=True),
)
TEXT_OUTPUTS = (
    TritonTensor("text_output", "TYPE_STRING", (1,)),
    TritonTensor("token_ids", "TYPE_INT32", (-1,)),
)
"""What every model of text takes and gives, as ``serve`` of triton_decode.py reads it; the names are those of
Triton's LLM backends."""


@dataclass(frozen=True)
class TritonModel:
    """One model of a repository: its configuration, and what puts the files of version 1 into a folder."""

    name: str
    backend: str
    """onnxruntime, python, tensorrt."""
    inputs: Sequence[TritonTensor]
    outputs: Sequence[TritonTensor]
    place: Callable[[Path], None]
    decoupled: bool = False
    """Sends any number of responses to a request."""
    parameters: tuple[tuple[str, str], ...] = ()
    kind: str = "KIND_CPU"
    default_file: str | None = None
    """The file of a version folder that is loaded; None for the backend's own name."""
    capability_files: tuple[tuple[str, str], ...] = ()
    """(compute capability, file): which one to load on which GPU."""
    profiles: tuple[str, ...] = ()
    """Optimization profiles that an instance may use; Triton takes the one nearest to a request."""

    def config(self) -> str:
        """The text of config.pbtxt."""
        lines = [f'name: "{self.name}"', f'backend: "{self.backend}"', "max_batch_size: 0"]
        for word, tensors in (("input", self.inputs), ("output", self.outputs)):
            entries = [_tensor_text(tensor) for tensor in tensors]
            lines.append(f"{word} [\n" + ",\n".join(entries) + "\n]")
        chosen = f" profile: [ {', '.join(map(_quoted, self.profiles))} ]" if self.profiles else ""
        lines.append(f"instance_group [ {{ count: 1 kind: {self.kind}{chosen} }} ]")
        if self.default_file is not None:
            lines.append(f'default_model_filename: "{self.default_file}"')
        for capability, file in self.capability_files:
            lines.append(f'cc_model_filenames {{ key: "{capability}" value: "{file}" }}')
        if self.decoupled:
            lines.append("model_transaction_policy { decoupled: true }")
        for key, value in self.parameters:
            lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class TritonRepository:
    """A written repository."""

    path: Path
    models: tuple[str, ...]


def triton_from_onnx(
    onnx_folder: Path, out: Path, *, name: str, progress: Progress = SILENT
) -> TritonRepository:
    """Write the repository ``out`` for a decoder's ONNX folder; it appears whole or not at all.

    Raises NirvanaError for a name that Triton's URLs cannot hold, a folder that onnxruntime-genai could not
    load or whose graph is damaged, inputs of a type that Triton does not have, or a disk without room.
    """
    require_name(name)
    for file in (MODEL_FILE, "genai_config.json", "tokenizer.json"):
        if not (onnx_folder / file).is_file():
            raise NirvanaError(
                f"{onnx_folder} has no {file}, which the decode model reads.",
                hint="Export it again from a checkpoint with a tokenizer: nirvana-deploy export CHECKPOINT "
                f"--out {onnx_folder} --force",
            )
    check_graph_file(onnx_folder / MODEL_FILE)
    size_bytes = sum(file.stat().st_size for file in files_under(onnx_folder))
    require_free_bytes(out, size_bytes, what="The Triton repository")
    graph = graph_model(onnx_folder, name=f"{name}-graph", progress=progress)
    decode = decode_model(name=name, graph=graph.name)
    return write_repository(out, [decode, graph])


def require_name(name: str) -> None:
    """Raise NirvanaError for a name that Triton's URLs cannot hold."""
    if not _NAME.fullmatch(name):
        raise NirvanaError(
            f"A model of Triton cannot be called {name!r}: letters, digits, '.', '_' and '-' only.",
            hint="Pass another --name.",
        )


def write_repository(out: Path, models: Sequence[TritonModel]) -> TritonRepository:
    """Write ``models`` as the repository ``out``, which appears whole or not at all."""
    with whole_folder(out) as folder:
        for model in models:
            version = folder / model.name / VERSION
            version.mkdir(parents=True)
            (folder / model.name / "config.pbtxt").write_text(model.config(), encoding="utf-8")
            model.place(version)
    return TritonRepository(path=out, models=tuple(model.name for model in models))


def copy_files(files: Mapping[Path, Path], version: Path, *, label: str, progress: Progress) -> None:
    """Copy ``files``, by their places below the folder ``version``."""
    with progress.task(label, len(files)) as advance:
        for place, file in files.items():
            (version / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, version / place)
            advance(1)


def graph_model(onnx_folder: Path, *, name: str, progress: Progress = SILENT) -> TritonModel:
    """One step of the decoder, as it stands in ``onnx_folder``, in the ONNX Runtime backend."""
    graph = onnx.load(onnx_folder / MODEL_FILE, load_external_data=False).graph

    def place(version: Path) -> None:
        copies = {MODEL_FILE / file.relative_to(onnx_folder): file for file in files_under(onnx_folder)}
        copy_files(copies, version, label="Copying the ONNX folder", progress=progress)

    return TritonModel(
        name=name,
        backend="onnxruntime",
        inputs=[_of_onnx(value) for value in graph.input],
        outputs=[_of_onnx(value) for value in graph.output],
        place=place,
    )


def decode_model(*, name: str, graph: str) -> TritonModel:
    """The decode loop on the files of the model ``graph``."""

    def place(version: Path) -> None:
        shutil.copyfile(triton_decode.__file__, version / "model.py")

    return TritonModel(
        name=name,
        backend="python",
        inputs=[
            *TEXT_INPUTS,
            TritonTensor("chat", "TYPE_BOOL", (1,), optional=True),
            TritonTensor("temperature", "TYPE_FP32", (1,), optional=True),
            TritonTensor("top_k", "TYPE_INT32", (1,), optional=True),
            TritonTensor("top_p", "TYPE_FP32", (1,), optional=True),
            TritonTensor("random_seed", "TYPE_INT32", (1,), optional=True),
        ],
        outputs=TEXT_OUTPUTS,
        place=place,
        decoupled=True,
        parameters=(("model_folder", f"../{graph}/{VERSION}/{MODEL_FILE}"),),
    )


def _of_onnx(value: onnx.ValueInfoProto) -> TritonTensor:
    tensor = value.type.tensor_type
    if tensor.elem_type not in _TYPES:
        word = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise NirvanaError(f"{value.name!r} is of type {word}, which this package cannot name for Triton.")
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return TritonTensor(value.name, _TYPES[tensor.elem_type], dims)


def _quoted(text: str) -> str:
    return f'"{text}"'


def _tensor_text(tensor: TritonTensor) -> str:
    dims = ", ".join(str(dim) for dim in tensor.dims)
    optional = " optional: true" if tensor.optional else ""
    return f'  {{ name: "{tensor.name}" data_type: {tensor.data_type} dims: [ {dims} ]{optional} }}'
