"""Packages of an output folder: where they go, and that the manifest knows those which lie inside it.

A package inside the folder is recorded like a stage, with its sha256, so that ``verify`` notices damage.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nirvana_deploy.base.artifact import files_under
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.held import held
from nirvana_deploy.base.ownership.marker import require_free
from nirvana_deploy.base.ownership.temporary import remove
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.registry import nearest_names
from nirvana_deploy.measure.speculative import DRAFT_TOKENS
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import (
    CHECKPOINT,
    ENCODER_FILE,
    MANIFEST,
    MODEL_FILE,
    ONNX,
    OPENVINO,
    SPECULATIVE,
    SPECULATIVE_FILE,
    is_seq2seq,
)
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage
from nirvana_deploy.output.undamaged import require_undamaged
from nirvana_deploy.output.variants import DENSE, ModelVariant, variants_of
from nirvana_deploy.package.gguf_export import GgufFile, gguf_from_checkpoint, wrote_gguf
from nirvana_deploy.package.openvino import OpenVinoFolder, openvino_from_onnx
from nirvana_deploy.package.speculative import require_pair, write_speculative
from nirvana_deploy.package.trial import SpeculativePackage, tried_out
from nirvana_deploy.package.triton import TritonRepository, triton_from_onnx
from nirvana_deploy.package.triton_engine import triton_from_engines, triton_from_seq2seq_engines
from nirvana_deploy.runtime.genai import require_speculative
from nirvana_deploy.runtime.tensorrt.record import is_part_of_seq2seq, read_engine_record
from nirvana_deploy.runtime.text import tokenizer_folder

GGUF_FOLDER = "gguf"
TRITON_FOLDER = "triton"


def package_gguf(
    source: Path | str,
    target: Path | str | None = None,
    *,
    weight_type: str = "f16",
    force: bool = False,
    progress: Progress = SILENT,
) -> GgufFile:
    """Write the checkpoint of ``source``, an output folder or a checkpoint folder, as a GGUF file.

    ``target`` None means ``source``/gguf/NAME-TYPE.gguf in an output folder. Raises NirvanaError when there
    is no checkpoint or it is damaged, when ``target`` exists and is not ours or ``force`` is not given, and
    as :func:`gguf_from_checkpoint` does.
    """
    source = Path(source)
    checkpoint = _part(
        source, CHECKPOINT, "config.json", "nirvana-deploy prune MODEL --sparsity 0.4 --out DIR"
    )
    name = f"{_name_of(source)}-{weight_type}.gguf"
    target = Path(target or _own_place(source) / GGUF_FOLDER / name)
    made: list[GgufFile] = []

    def work() -> dict[str, Any]:
        opened = Checkpoint.open(checkpoint)
        made.append(gguf_from_checkpoint(opened, target, weight_type=weight_type, progress=progress))
        return {key: value for key, value in gguf_record(made[0]).items() if key != "out"}

    with _held(source, target, force=force, reads=[checkpoint], wrote=wrote_gguf):
        require_undamaged(checkpoint, progress=progress)
        _record(source, stage.gguf(weight_type), target, work, progress, from_stage=stage.CHECKPOINT)
    return made[0]


def gguf_record(file: GgufFile) -> dict[str, Any]:
    """What is said of a GGUF file to machines."""
    record = dataclasses.asdict(file)
    return {"out": str(record.pop("path")), **record}


def package_triton(
    source: Path | str,
    target: Path | str | None = None,
    *,
    name: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> TritonRepository:
    """Write the ONNX model of ``source``, an output folder or an ONNX folder, as a Triton model repository.

    ``target`` None means ``source``/triton; ``name`` None means the folder's name. Raises NirvanaError when
    there is no ONNX model or it is damaged, when ``target`` exists and ``force`` is not given, and as
    :func:`triton_from_onnx` does.
    """
    source = Path(source)
    if is_seq2seq(source) or is_seq2seq(source / ONNX):
        raise NirvanaError(
            "The ONNX model of an encoder-decoder cannot be packaged for Triton: "
            "the decode model runs on onnxruntime-genai, which has no T5.",
            hint="Its engines can: build-engine OUT, then package OUT --triton --engine "
            "OUT/engine/NAME-decoder.engine",
        )
    onnx = _part(source, ONNX, MODEL_FILE, "nirvana-deploy export CHECKPOINT --out DIR")
    target = Path(target or _own_place(source) / TRITON_FOLDER)
    made: list[TritonRepository] = []

    def work() -> dict[str, Any]:
        made.append(triton_from_onnx(onnx, target, name=name or _name_of(source), progress=progress))
        return {"models": list(made[0].models)}

    with _held(source, target, force=force, reads=[onnx]):
        require_undamaged(onnx, progress=progress)
        _record(source, stage.TRITON, target, work, progress)
    return made[0]


def package_openvino(
    source: Path | str,
    target: Path | str | None = None,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> OpenVinoFolder:
    """Write the ONNX model of ``source``, an output folder or an ONNX folder, for openvino-genai.

    ``target`` None means ``source``/openvino. Raises NirvanaError when there is no ONNX model or it is
    damaged, when ``target`` exists and ``force`` is not given, and as :func:`openvino_from_onnx` does.
    """
    source = Path(source)
    inside = source / ONNX if is_seq2seq(source / ONNX) else source
    landmark = ENCODER_FILE if is_seq2seq(inside) else MODEL_FILE
    onnx = _part(source, ONNX, landmark, "nirvana-deploy export CHECKPOINT --out DIR")
    target = Path(target or _own_place(source) / OPENVINO)
    made: list[OpenVinoFolder] = []

    def work() -> dict[str, Any]:
        made.append(openvino_from_onnx(onnx, target, progress=progress))
        return {"size_bytes": made[0].size_bytes}

    with _held(source, target, force=force, reads=[onnx]):
        require_undamaged(onnx, progress=progress)
        _record(source, stage.OPENVINO, target, work, progress)
    return made[0]


def package_engines(
    engines: Sequence[str],
    source: Path | str,
    target: Path | str | None = None,
    *,
    name: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> TritonRepository:
    """Write engines as one model of a Triton repository, ``target`` None meaning ``source``/triton.

    Each of ``engines`` is ``FILE`` or ``sm89=FILE``; without a target the engine's own record must name it.
    The decoder's engine of an encoder-decoder, alone, is packaged with its encoder as a model of text.
    Raises NirvanaError for a target named twice or not at all, when ``target`` exists and ``force`` is not
    given, and as :func:`triton_from_engines` and :func:`triton_from_seq2seq_engines` do.
    """
    source = Path(source)
    target = Path(target or _own_place(source) / TRITON_FOLDER)
    files = [Path(one.rpartition("=")[2]) for one in engines]
    with _held(source, target, force=force, reads=files):
        if any(is_part_of_seq2seq(read_engine_record(file, check_bytes=False)) for file in files):
            return _package_seq2seq(files, source, target, name=name, progress=progress)
        return _package_decoders(engines, source, target, name=name, progress=progress)


def _package_decoders(
    engines: Sequence[str], source: Path, target: Path, *, name: str | None, progress: Progress
) -> TritonRepository:
    by_target: dict[str, Path] = {}
    for one in engines:
        given, _, file = one.rpartition("=")
        path = Path(file)
        targets = (given,) if given else read_engine_record(path, check_bytes=False).targets
        for capability in targets:
            if capability in by_target:
                raise NirvanaError(f"{by_target[capability]} and {path} are both for {capability}.")
            by_target[capability] = path
    made: list[TritonRepository] = []

    def work() -> dict[str, Any]:
        called = name or f"{_name_of(source)}-engine"
        made.append(triton_from_engines(by_target, target, name=called, progress=progress))
        return {"models": list(made[0].models)}

    _record(source, stage.TRITON, target, work, progress)
    return made[0]


def _package_seq2seq(
    files: Sequence[Path], source: Path, target: Path, *, name: str | None, progress: Progress
) -> TritonRepository:
    if len(files) > 1:
        raise NirvanaError(
            f"An encoder-decoder is served by one pair of engines, got {len(files)} files.",
            hint="Name its decoder alone; the encoder beside it is found. A GPU of another kind takes a "
            "repository of its own.",
        )
    made: list[TritonRepository] = []

    def work() -> dict[str, Any]:
        (decoder,), called = files, name or f"{_name_of(source)}-engine"
        folder = tokenizer_folder(decoder)
        made.append(triton_from_seq2seq_engines(decoder, folder, target, name=called, progress=progress))
        return {"models": list(made[0].models)}

    _record(source, stage.TRITON, target, work, progress)
    return made[0]


class Pairing(NamedTuple):
    """What is asked of a target with its draft, as ``pipeline/alone/packages.py`` takes it."""

    target: str | None
    draft: str | None
    draft_tokens: int | None
    threads: int | None


def speculative_package(
    source: Path, out: Path | str | None, asked: Pairing, *, force: bool, progress: Progress
) -> SpeculativePackage:
    """Write, prove and measure a target with its draft; raises as ``package_speculative`` says."""
    draft_tokens = asked.draft_tokens
    models = _models_of(source)
    names = (
        asked.target or (DENSE if models else str(source)),
        asked.draft or _smallest_cut(models, source),
    )
    target_folder, draft_folder = (_model_folder(name, models, source) for name in names)
    place = Path(out or _own_place(source) / SPECULATIVE)
    require_speculative()
    require_pair(target_folder, draft_folder)
    made: list[SpeculativePackage] = []

    def work() -> dict[str, Any]:
        tried = DRAFT_TOKENS if draft_tokens is None else (draft_tokens,)
        write_speculative(target_folder, draft_folder, place, draft_tokens=tried[0])
        shown = [name if name in models else Path(name).name for name in names]
        try:
            names_shown = (shown[0], shown[1])
            made.append(
                tried_out(place, names_shown, draft_tokens=tried, threads=asked.threads, progress=progress)
            )
        except BaseException:  # nothing vouches for it
            remove(place)
            raise
        return made[0].record

    with _held(source, place, force=force, reads=(target_folder, draft_folder)):
        for folder in (target_folder, draft_folder):
            require_undamaged(folder, progress=progress)
        if _is_inside(source, place):
            inside = place.resolve().relative_to(source.resolve()).as_posix()
            needs = tuple(models[name].stage for name in names if name in models)
            with Run.open(source, writing=True, progress=progress) as run:
                run.run(Stage(stage.SPECULATIVE, needs=needs, makes=(inside,), work=work), redo=True)
        else:
            work()
    made[0].report.require_passed(place, against="its target alone")
    return made[0]


def benchmark_speculative(
    folder: Path | str, *, new_tokens: int, threads: int | None = None, progress: Progress = SILENT
) -> SpeculativePackage:
    """Measure a folder of :func:`package_speculative` again, and keep the fastest of 1 to 6 draft tokens."""
    folder = Path(folder)
    require_speculative()
    before = read_json(folder / SPECULATIVE_FILE)
    out = folder.resolve().parent

    def again() -> SpeculativePackage:
        names = (str(before["target"]), str(before["draft"]))
        return tried_out(
            folder,
            names,
            draft_tokens=DRAFT_TOKENS,
            new_tokens=new_tokens,
            threads=threads,
            progress=progress,
        )

    if not (out / MANIFEST).is_file():
        return again()
    with Run.open(out, writing=True, progress=progress) as run:
        made = again()
        if run.has(stage.SPECULATIVE):
            run.rehash(stage.SPECULATIVE)
    return made


def _models_of(source: Path) -> dict[str, ModelVariant]:
    """The models of an output folder by name; none of another folder."""
    if not (source / MANIFEST).is_file():
        return {}
    return {variant.name: variant for variant in variants_of(Run.open(source))}


def _smallest_cut(models: Mapping[str, ModelVariant], source: Path) -> str:
    cuts = [variant for variant in models.values() if not variant.dense]
    if not cuts:
        raise NirvanaError(
            f"{source} has no pruned model that could draft.",
            hint="Name an ONNX folder of one: --draft smollm2-s0.4/onnx-w4",
        )
    sizes = {one.name: sum(file.stat().st_size for file in files_under(source / one.folder)) for one in cuts}
    return min(sizes, key=lambda name: sizes[name])


def _model_folder(name: str, models: Mapping[str, ModelVariant], source: Path) -> Path:
    if name in models:
        return source / models[name].folder
    if Path(name).is_dir():
        return Path(name)
    there = f"it has {', '.join(models)}" if models else "and it is no output folder"
    close = nearest_names(name, list(models))
    guess = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise NirvanaError(
        f"{source} has no model {name!r}; {there}. Nor is it an ONNX folder.{guess}",
        hint="A quantized one is made by: nirvana-deploy quantize OUT --scheme w4",
    )


def _part(source: Path, inside: str, landmark: str, command: str) -> Path:
    """The folder that holds ``landmark``: ``source`` itself, or its part ``inside``."""
    for folder in (source / inside, source):
        if (folder / landmark).is_file():
            return folder
    raise NirvanaError(
        f"{source} holds no {inside}/{landmark}, and no {landmark}.", hint=f"Make it: {command}"
    )


def _name_of(source: Path) -> str:
    """A name for files and servers: that of the folder, or of the one around a part like ``checkpoint``."""
    folder = source.resolve()
    name = folder.name
    if name in (CHECKPOINT, ONNX):
        name = folder.parent.name
    elif name.startswith(f"{ONNX}-"):  # a quantized variant
        name = folder.parent.name + name.removeprefix(ONNX)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name) or "model"


def _own_place(source: Path) -> Path:
    """An output folder, which has a place for its packages; raises NirvanaError for any other."""
    if not (source / MANIFEST).is_file():
        raise NirvanaError(
            f"{source} is not an output folder: nothing is put into it.",
            hint="Say where to write with --out.",
        )
    return source


def _is_inside(source: Path, target: Path) -> bool:
    """Whether a package lies in the output folder ``source``, whose manifest knows it then."""
    return (source / MANIFEST).is_file() and target.resolve().is_relative_to(source.resolve())


@contextmanager
def _held(
    source: Path,
    target: Path,
    *,
    force: bool,
    reads: Sequence[Path],
    wrote: Callable[[Path], bool] | None = None,
) -> Iterator[None]:
    """Keep others away from ``target``; inside an output folder its run does so."""
    if _is_inside(source, target):
        require_free(target, force=force, reads=reads, wrote=wrote)
        yield
        return
    with held(target, force=force, reads=reads, wrote=wrote):
        yield


def _record(
    source: Path,
    name: str,
    target: Path,
    work: Callable[[], dict[str, Any]],
    progress: Progress,
    *,
    from_stage: str = stage.ONNX,
) -> None:
    """Do ``work``; inside an output folder as the stage ``name``, whose files the manifest knows."""
    if _is_inside(source, target):
        made = target.resolve().relative_to(source.resolve()).as_posix()
        packaged = Stage(name, needs=(from_stage,), makes=(made,), work=work)
        with Run.open(source, writing=True, progress=progress) as run:
            run.run(packaged, redo=True)
    else:
        work()
