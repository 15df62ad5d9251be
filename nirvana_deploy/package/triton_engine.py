"""A Triton model from engines: one ``model.plan`` for each compute capability, one configuration.

```
REPOSITORY/NAME/config.pbtxt
REPOSITORY/NAME/1/model.sm86.plan   model.sm89.plan   ...
```

A plan of ``tensorrt`` runs on the kind of GPU that it was built on; ``cc_model_filenames`` lets Triton pick
[Triton, model_configuration.md]. One request is one pass of the decoder: ids in, logits and the whole KV
cache out, which the client sends back with the next token. That is a component for pipelines that keep their
cache themselves, not a server of text; for text there is the decode model of ``triton.py``.

What Triton's TensorRT backend cannot run is refused: engines of ``tensorrt-rtx``, which is another runtime,
and in-place caches, whose outputs must lie in their inputs' memory while Triton gives each its own. **No
Triton server with a GPU has loaded one of these yet**; the configuration is checked against Triton's schema.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from nirvana_deploy.base.artifact import require_free_bytes
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.package.triton import (
    TritonModel,
    TritonRepository,
    TritonTensor,
    require_name,
    write_repository,
)
from nirvana_deploy.runtime.tensorrt.record import EngineRecord, TensorRecord, read_engine_record

_TYPES = {
    "bool": "TYPE_BOOL",
    "bfloat16": "TYPE_BF16",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
_TARGET = re.compile(r"sm(\d{1,2})(\d)")


def triton_from_engines(
    engines: Mapping[str, Path], out: Path, *, name: str, progress: Progress = SILENT
) -> TritonRepository:
    """Write the repository ``out`` for ``engines``, by target (``sm89``); it appears whole or not at all.

    Raises NirvanaError for engines that Triton's backend cannot run, that differ in inputs, outputs or
    profiles, for a target that is not a compute capability, or a disk without room.
    """
    require_name(name)
    if not engines:
        raise NirvanaError("A Triton model needs at least one engine.", hint="--engine sm89=model.engine")
    records = {target: _servable(path) for target, path in engines.items()}
    files = {_capability(target): f"model.{target}.plan" for target in engines}
    first = next(iter(records.values()))
    for target, record in records.items():
        if (record.inputs, record.outputs, record.profiles) != (first.inputs, first.outputs, first.profiles):
            raise NirvanaError(
                f"The engine for {target} has other inputs, outputs or profiles than {first.engine_file}: "
                "plans of one model must agree.",
                hint="Build all of them from one ONNX folder with the same options.",
            )
    require_free_bytes(out, sum(r.engine_bytes for r in records.values()), what="The Triton repository")

    def place(version: Path) -> None:
        with progress.task("Copying engines", len(engines)) as advance:
            for target, path in engines.items():
                shutil.copyfile(path, version / f"model.{target}.plan")
                advance(1)

    model = TritonModel(
        name=name,
        backend="tensorrt",
        inputs=[_tensor(tensor) for tensor in first.inputs],
        outputs=[_tensor(tensor) for tensor in first.outputs],
        place=place,
        kind="KIND_GPU",
        default_file=next(iter(files.values())),
        capability_files=tuple(files.items()),
        profiles=tuple(str(index) for index in range(len(first.profiles))),
    )
    return write_repository(out, [model])


def _servable(path: Path) -> EngineRecord:
    record = read_engine_record(path)
    if record.runtime != "tensorrt":
        raise NirvanaError(
            f"{path} is an engine of {record.runtime}; Triton's TensorRT backend reads those of tensorrt.",
            hint="Build one on the GPU that serves: nirvana-deploy build-engine DIR --engine tensorrt",
        )
    if record.kv == "in-place":
        raise NirvanaError(
            f"{path} updates its KV cache in place; Triton gives every output memory of its own.",
            hint="Export the ONNX with --flavor portable and build the engine again.",
        )
    if record.stripped:
        raise NirvanaError(f"{path} holds no weights; Triton does not refit.")
    return record


def _capability(target: str) -> str:
    """``8.9`` for ``sm89``, as Triton's configuration has it."""
    matched = _TARGET.fullmatch(target)
    if matched is None:
        raise NirvanaError(
            f"{target!r} is not a compute capability like sm89 or sm120.",
            hint="Say which GPU an engine is for: --engine sm89=model.engine ('nirvana-deploy doctor' there "
            "names it)",
        )
    return f"{matched[1]}.{matched[2]}"


def _tensor(tensor: TensorRecord) -> TritonTensor:
    if tensor.dtype not in _TYPES:
        raise NirvanaError(f"{tensor.name!r} is {tensor.dtype}, which this package cannot name for Triton.")
    dims = tuple(-1 if size is None else size for size in tensor.shape)
    return TritonTensor(tensor.name, _TYPES[tensor.dtype], dims)
