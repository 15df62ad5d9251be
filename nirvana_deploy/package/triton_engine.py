"""Triton models from engines: one pass of a decoder, or text from the two engines of an encoder-decoder.

```
REPOSITORY/NAME/1/model.sm86.plan   model.sm89.plan   ...   one plan for each compute capability
REPOSITORY/NAME/1/model.py   engine/                        the loop of triton_seq2seq_decode.py, its engines
```
**No Triton server has loaded one of these yet**: configurations are checked against Triton's schema.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import require_free_bytes
from nirvana_deploy.package import triton_seq2seq_decode
from nirvana_deploy.package.triton import (
    TEXT_INPUTS,
    TEXT_OUTPUTS,
    TritonModel,
    TritonRepository,
    TritonTensor,
    copy_files,
    require_name,
    write_repository,
)
from nirvana_deploy.runtime.tensorrt.encoder_decoder import config_folder
from nirvana_deploy.runtime.tensorrt.record import (
    ENCODER,
    EngineRecord,
    TensorRecord,
    engine_files,
    read_engine_record,
    record_path,
)

ENGINE_FOLDER = "engine"
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "spiece.model")

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

    A plan runs on the kind of GPU that it was built on; ``cc_model_filenames`` lets Triton pick [Triton,
    model_configuration.md]. One request is one pass: ids in, logits and the whole KV cache out, which the
    client sends back with the next token. Triton's TensorRT backend runs neither engines of ``tensorrt-rtx``
    nor in-place caches, whose outputs must lie in their inputs' memory.

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
        copies = {Path(f"model.{target}.plan"): path for target, path in engines.items()}
        copy_files(copies, version, label="Copying engines", progress=progress)

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


def triton_from_seq2seq_engines(
    decoder: Path, tokenizer: Path, out: Path, *, name: str, progress: Progress = SILENT
) -> TritonRepository:
    """Write the repository ``out`` for ``decoder`` and the encoder's engine beside it; whole or not at all.

    One pass of the decoder needs the encoder's states and two kinds of cache, so the runner of this package
    serves, on ``tensorrt`` and ``tensorrt-rtx`` alike; the Python that Triton starts must have this package.
    ``tokenizer`` is the folder of the tokenizer's files. Raises NirvanaError for the encoder's engine in the
    place of the decoder's, for one that is damaged or without weights, where no config.json nearby names the
    first token, for a name that Triton's URLs cannot hold, or a disk without room.
    """
    require_name(name)
    record = read_engine_record(decoder)
    if record.part == ENCODER:
        raise NirvanaError(
            f"{decoder} is the encoder of an encoder-decoder, which is served by its decoder.",
            hint="Name the decoder's engine: --engine NAME-decoder.engine",
        )
    engines = engine_files(decoder)
    records = [read_engine_record(engine) for engine in engines]
    for engine, one in zip(engines, records, strict=True):
        if one.stripped:
            raise NirvanaError(f"{engine} holds no weights; nothing refits it in Triton.")
    config = config_folder(decoder) / "config.json"
    texts = sorted({path for pattern in _TOKENIZER_FILES for path in tokenizer.glob(pattern)})
    files = [*(path for engine in engines for path in (engine, record_path(engine))), config, *texts]
    require_free_bytes(out, sum(path.stat().st_size for path in files), what="The Triton repository")

    def place(version: Path) -> None:
        shutil.copyfile(triton_seq2seq_decode.__file__, version / "model.py")
        copies = {Path(ENGINE_FOLDER, path.name): path for path in files}
        copy_files(copies, version, label="Copying engines", progress=progress)

    model = TritonModel(
        name=name,
        backend="python",
        inputs=TEXT_INPUTS,
        outputs=TEXT_OUTPUTS,
        place=place,
        decoupled=True,
        parameters=(("decoder", f"{ENGINE_FOLDER}/{decoder.name}"),),
        kind="KIND_GPU",
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
