"""The models that ``peers.py`` and ``runtimes.py`` time: how each is made, and which program runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peer_process import HERE, PeerProcess, end, last_words, over_limit  # the script beside this one

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.resources import require_memory
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.layout import CHECKPOINT, MANIFEST
from nirvana_deploy.output.variants import variant_named
from nirvana_deploy.package.gguf_export import gguf_from_checkpoint

OURS = ("dense", "dense-int8", "dense-w8", "dense-w4", "pruned", "pruned-int8", "pruned-w8", "pruned-w4")
"""Those of them that the output folder has."""
_TIMES_WEIGHTS = 2
"""Memory that a runtime takes, in times of its files: many hold a copy in another order."""
_LLAMA_CPP = "llama-cpp"
"""Our own runtime of GGUF files, where no folder with node-llama-cpp is given."""
_OPTIMUM = """
import sys
from optimum.onnxruntime import ORTModelForCausalLM
ORTModelForCausalLM.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])
"""
_OPENVINO = """
import ast, sys
from optimum.intel import OVModelForCausalLM
config = ast.literal_eval(sys.argv[2])
how = {"quantization_config": config} if config else {"export": True, "load_in_8bit": False}
OVModelForCausalLM.from_pretrained(sys.argv[1], compile=False, **how).save_pretrained(sys.argv[3])
"""
_OPENVINO_CONFIGS = {"fp32": None, "int8": {"bits": 8}, "int4": {"bits": 4, "group_size": 64}}
"""Precision -> of OVWeightQuantizationConfig; 64, since its 128 does not divide the rows of SmolLM2."""


@dataclass(frozen=True)
class Places:
    """Where things are."""

    out: Path
    """The output folder."""
    work: Path
    """Where models are kept."""
    llama_cpp: Path | None
    """A folder with node-llama-cpp."""
    optimum: Path
    """A Python with optimum-onnx."""
    openvino: Path
    """A Python with openvino."""
    limit_s: float
    """What making one model may take, and loading it, and each answer."""

    @property
    def dense(self) -> Path:
        """The dense checkpoint."""
        return Path(read_json(self.out / MANIFEST)["model"]["path"])


@dataclass(frozen=True)
class Artifact:
    """One model for one runtime."""

    name: str
    kind: str
    """Of ``peer_worker.KINDS``, a runtime of ours, or "llama.cpp"."""
    path: Path
    made: str
    """By what, for people."""
    make: Callable[[Path], None] | None = None
    """Writes the path; None where it is there."""

    @property
    def weights_bytes(self) -> int:
        """Of the files that hold weights and graph."""
        if self.path.is_file():
            return self.path.stat().st_size
        kinds = (".onnx", ".onnx.data", ".onnx_data", ".safetensors", ".bin", ".xml")
        files = [file for file in self.path.iterdir() if file.name.endswith(kinds)]
        return sum(file.stat().st_size for file in files if "tokenizer" not in file.name)

    def command(self, places: Places, threads: int) -> list[str]:
        """What runs it; raises NirvanaError where nothing can."""
        kind = self.kind
        if kind == "llama.cpp" and places.llama_cpp is None:
            kind = _LLAMA_CPP
        elif kind == "llama.cpp":
            node = shutil.which("node")
            if node is None:
                raise NirvanaError("node, which runs node-llama-cpp, is not installed")
            script = str(HERE / "peer_llama_cpp.mjs")
            return [node, script, str(self.path), str(threads), str(places.llama_cpp)]
        python = {"optimum-onnx": places.optimum, "openvino": places.openvino}.get(kind)
        script = str(HERE / "peer_worker.py")
        return [str(python or sys.executable), script, kind, str(self.path), str(threads)]


def started(
    chosen: Sequence[Artifact], places: Places, stack: ExitStack, *, threads: int
) -> tuple[dict[str, PeerProcess], dict[str, str]]:
    """Make and load all that can be, each in a process that ends with ``stack``, by name; and why not others.

    Raises NirvanaError where the memory has no room for all of them.
    """
    reasons: dict[str, str] = {}
    for one in chosen:
        print(f"making {one.name}", flush=True)
        try:
            make(one)
        except NirvanaError as error:
            reasons[one.name] = last_words(error.message)
    made = [one for one in chosen if one.name not in reasons]
    hint = "Take a machine with more memory, or fewer models."
    needed_bytes = _TIMES_WEIGHTS * sum(one.weights_bytes for one in made)
    require_memory(needed_bytes, what=f"Running {len(made)} models", hint=hint)
    running: dict[str, PeerProcess] = {}
    for one in made:
        print(f"loading {one.name}", flush=True)
        try:
            process = PeerProcess(one.command(places, threads), threads=threads, limit_s=places.limit_s)
            running[one.name] = stack.enter_context(process)
        except NirvanaError as error:
            reasons[one.name] = last_words(error.message)
    return running, reasons


def make(one: Artifact) -> None:
    """Write an artifact unless it is there; raises NirvanaError with the reason where that fails."""
    if one.make is None or one.path.exists():
        return
    partial_path = one.path.with_name(f"{one.path.stem}-partial{one.path.suffix}")
    shutil.rmtree(partial_path, ignore_errors=True)
    partial_path.unlink(missing_ok=True)
    partial_path.parent.mkdir(parents=True, exist_ok=True)
    one.make(partial_path)
    partial_path.rename(one.path)


def artifacts(places: Places) -> Iterator[Artifact]:
    """All that are compared, ours last."""
    dense, work = places.dense, places.work
    yield Artifact("transformers fp32", "transformers", dense, "the checkpoint, eager")
    yield Artifact(
        "torch.compile fp32", "torch.compile", dense, "steps compiled over a StaticCache, prompts eager"
    )
    yield Artifact(
        "optimum-onnx fp32",
        "optimum-onnx",
        work / "optimum-onnx",
        "ORTModelForCausalLM.from_pretrained(..., export=True)",
        partial(_run_python, places.limit_s, places.optimum, _OPTIMUM, str(dense)),
    )
    for precision in ("fp32", "int4"):
        yield Artifact(
            f"onnxruntime-genai builder {precision}",
            "onnxruntime-genai",
            work / f"builder-{precision}",
            f"python -m onnxruntime_genai.models.builder -p {precision} -e cpu",
            partial(_built, places.limit_s, dense, precision, work / "builder-cache"),
        )
    plain = work / "openvino-fp32"
    for precision, config in _OPENVINO_CONFIGS.items():
        source, how = (plain, f"the same, quantization_config={config}") if config else (dense, "export=True")
        yield Artifact(
            f"OpenVINO {precision}",
            "openvino",
            work / f"openvino-{precision}",
            f"OVModelForCausalLM of optimum-intel, {how}",
            partial(_run_python, places.limit_s, places.openvino, _OPENVINO, str(source), str(config)),
        )
    for kind in ("f32", "q8_0", "q4_0"):
        yield gguf(f"llama.cpp {kind}", dense, work / f"dense-{kind}.gguf", kind)
    yield from _ours(places)


def _ours(places: Places) -> Iterator[Artifact]:
    options = read_json(places.out / MANIFEST)["options"]
    made = "prune-export --preset {preset} --sparsity {sparsity} --flavor {flavor}".format(**options)
    for name in OURS:
        folder = places.out / variant_named(name).folder
        if folder.is_dir():
            yield Artifact(f"ours: {name}", "onnxruntime-genai", folder, made)
    for kind in ("q8_0", "q4_0"):
        file = places.work / f"pruned-{kind}.gguf"
        yield gguf(f"ours: pruned in llama.cpp {kind}", places.out / CHECKPOINT, file, kind)


def gguf(name: str, checkpoint: Path, file: Path, kind: str) -> Artifact:
    """A checkpoint as a GGUF file of a weight type."""
    by = "node-llama-cpp, or llama-cpp-python without --llama-cpp; its calls are part of the times"
    made = f"package --gguf --type {kind}; in llama.cpp by {by}"
    return Artifact(name, "llama.cpp", file, made, partial(_gguf_written, checkpoint, kind))


def _gguf_written(checkpoint: Path, kind: str, target: Path) -> None:
    gguf_from_checkpoint(Checkpoint.open(checkpoint), target, weight_type=kind)


def _built(limit_s: float, dense: Path, precision: str, cache: Path, target: Path) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(dense), "-o", str(target)]
    _run([*command, "-p", precision, "-e", "cpu", "-c", str(cache)], limit_s)


def _run_python(limit_s: float, python: Path, script: str, *arguments: str | Path) -> None:
    _run([str(python), "-c", script, *map(str, arguments)], limit_s)


def _run(command: list[str], limit_s: float) -> None:
    """Run a program to its end; raises NirvanaError with its last words, or where its time is over."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, said = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise NirvanaError(over_limit(limit_s)) from None
        finally:
            end(process)
    if process.returncode:
        raise NirvanaError(last_words(said))
