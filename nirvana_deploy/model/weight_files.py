"""Which files hold a model's weights: safetensors under the names that transformers reads, never pickles.

Whatever else loads the folder (transformers, the evaluation harness) must read the bytes that we read.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError, pip_install
from nirvana_deploy.base.reading import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""Read where there is no SINGLE_FILE, as transformers does."""
_ADAPTER = "adapter_config.json"
_LONGEST_NAME_BYTES = 255
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def require_weight_files(folder: Path) -> None:
    """Raise NirvanaError unless transformers reads the safetensors of ``folder``, all of which are there.

    The message names the files in the way, the hint a command.
    """
    found = sorted(folder.glob("*.safetensors"))
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if not found:
        if pickles:
            raise pickle_refused(pickles, folder=folder)
        raise NirvanaError(
            f"{folder} has no *.safetensors file.",
            hint="Pass a folder with weights; of an ONNX folder, the checkpoint that it was exported from.",
        )
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        raise _unknown_name(found, pickles, folder=folder)
    require_no_adapter(folder)
    for index in folder.glob("*.safetensors.index.json"):
        file_by_tensor(index)


def require_no_adapter(folder: Path) -> None:
    """Raise NirvanaError for an adapter, alone or beside weights, with the command that merges it."""
    if not (folder / _ADAPTER).is_file():
        return
    settings = read_json(folder / _ADAPTER)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    merged = f"{folder}-merged"
    known = f" for {base[:200]!r}" if isinstance(base, str) else ", and does not say of which model"
    merge = _python(
        "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
        f"M.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained({merged!r}); "
        f"T.from_pretrained({str(base)!r}).save_pretrained({merged!r})"
    )
    raise NirvanaError(
        f"{folder} holds an adapter ({_ADAPTER}){known}: transformers would apply it, and this tool "
        "would not.",
        hint=f"Merge it into that model: {pip_install()} peft, {merge}, then pass {merged}. If the weights "
        f"beside it are merged already, remove {_ADAPTER}.",
    )


def require_no_other_file(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise NirvanaError if ``config``, the parsed config.json, sends transformers to another file."""
    if (other := config.get("transformers_weights")) not in (None, SINGLE_FILE):
        raise NirvanaError(
            f"{folder / 'config.json'} has transformers_weights = {other!r}: transformers would read "
            f"that file, and this tool {SINGLE_FILE} or the shards of {INDEX_FILE}.",
            hint=f"Remove the key from config.json, and rename the file if it holds the model: {SINGLE_FILE}",
        )


def weight_files(folder: Path) -> set[Path]:
    """The safetensors of ``folder`` that transformers reads; all of them where it would read none."""
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE}
    if (folder / INDEX_FILE).is_file():
        return set(file_by_tensor(folder / INDEX_FILE).values())
    return set(folder.glob("*.safetensors"))


def file_by_tensor(index: Path) -> dict[str, Path]:
    """The shard of every tensor, by an index file.

    Raises NirvanaError for an index that is none, or names shards that are missing or outside its folder.
    """
    parsed = read_json(index)
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict):
        raise NirvanaError(f"{index} is not a checkpoint index: it has no object 'weight_map'.")
    shards = {str(shard) for shard in weight_map.values()}
    if outside := sorted(shard for shard in shards if Path(shard).name != shard):
        raise NirvanaError(f"{index} names a shard outside its folder: {outside[0]!r}.")
    if too_long := [shard for shard in shards if len(shard.encode(errors="replace")) > _LONGEST_NAME_BYTES]:
        raise NirvanaError(
            f"{index} names a shard of {len(too_long[0]):,} characters, longer than any file's name: "
            f"{too_long[0][:40]}..."
        )
    if missing := sorted(shard for shard in shards if not (index.parent / shard).is_file()):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise NirvanaError(
            f"{index.parent} is incomplete: {index.name} names {', '.join(missing[:3])}{more}, "
            "which the folder does not hold.",
            hint="Download or copy the missing files again.",
        )
    return {name: index.parent / str(shard) for name, shard in weight_map.items()}


def pickle_refused(files: list[Path], *, folder: Path) -> NirvanaError:
    """Why pickles are not read, and how to convert them."""
    convert = _python(
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({str(folder)!r}).save_pretrained({f'{folder}-safetensors'!r})"
    )
    return NirvanaError(
        f"{', '.join(path.name for path in files[:3])}: pickle weights are refused, because loading a pickle "
        "can run any code that its author put there.",
        hint=f"If you trust the author, convert once: {convert} "
        "(and copy the tokenizer's files), then pass the new folder.",
    )


def _unknown_name(found: list[Path], pickles: list[Path], *, folder: Path) -> NirvanaError:
    instead = f", and would load {pickles[0].name} in its place" if pickles else ""
    target = folder / SINGLE_FILE
    if len(found) == 1:
        hint = f"If it holds the model: mv {shlex.quote(str(found[0]))} {shlex.quote(str(target))}"
    else:
        merge = _python(
            "from pathlib import Path; from safetensors.torch import load_file, save_file; "
            f"d = Path({str(folder)!r}); "
            "save_file({n: t for f in sorted(d.glob('*.safetensors')) for n, t in load_file(f).items()}, "
            f"d / '{SINGLE_FILE}', {{'format': 'pt'}})"
        )
        hint = f"If together they hold the model, merge them: {merge}"
    return NirvanaError(
        f"{folder} has weights in {', '.join(path.name for path in found[:3])}, which transformers does not "
        f"read{instead}: it reads {SINGLE_FILE}, or the shards of {INDEX_FILE}.",
        hint=hint,
    )


def _python(script: str) -> str:
    """A command to type; quoted, since a stranger may have named the folder."""
    return f"python -c {shlex.quote(script)}"
