"""What commands of a trial read: tiny random models and what this tool makes of them, made once."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from campaign.trial import Outcome, call, run
from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.ownership.marker import CARD, MARKER, marked_names

SHORT = ("--preset", "paper", "--sparsity", "0.3", "--num-sequences", "4", "--seq-len", "16")
"""Options of a job of a second."""
_PASSING = (".nirvana-deploy.lock", ".nirvana-deploy.recovery")
"""What a command keeps in its output folder until it is done."""
_CACHES = (".cache", ".config", ".triton")
"""Folders of a home that libraries keep for themselves."""


class World:
    """Inputs by name, and a new folder with copies of some of them for each trial."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._inputs = base / "inputs"
        self._inputs.mkdir()
        self.home, self.temporary = base / "home", base / "tmp"
        self.home.mkdir()
        self.temporary.mkdir()
        self._count = 0
        self._known_to_work: set[str] = set()

    @contextmanager
    def folder(self, *names: str) -> Iterator[Path]:
        """A folder that holds copies of the inputs ``names``; gone afterwards."""
        for name in names:
            self._make(name)
        self._count += 1
        folder = self.base / f"trial-{self._count}"
        folder.mkdir()
        try:
            for name in names:
                source = self._inputs / name
                copy: Callable[..., object] = shutil.copytree if source.is_dir() else shutil.copy2
                copy(source, folder / name)
            yield folder
        finally:
            remove(folder)

    def without_damage(self, command: str, names: Collection[str]) -> list[str]:
        """What is wrong with how a command ends that reads whole inputs; asked once for each."""
        if command in self._known_to_work:
            return []
        self._known_to_work.add(command)
        with self.folder(*names) as folder:
            return run(*command.split(), folder=folder).complaints(allowed=frozenset({0}))

    def strays(self) -> list[str]:
        """A complaint about what a home holds beside caches, and about temporary files; removes them."""
        found = [path for path in self.home.iterdir() if path.name not in _CACHES]
        found += self.temporary.iterdir()
        for path in found:
            remove(path) if path.is_dir() else path.unlink()
        return [f"left in {found[0].parent.name}: {found[0].name}"] if found else []

    def made(self, name: str) -> Path:
        """The input ``name`` itself, to compare with."""
        self._make(name)
        return self._inputs / name

    def _make(self, name: str) -> None:
        if (self._inputs / name).exists():
            return
        maker, needs = _MAKERS[name]
        for need in needs:
            self._make(need)
        done = maker(self._inputs)
        if done.code or not (self._inputs / name).exists():
            raise RuntimeError(f"cannot make {name}: {done.stderr[-2000:]}")


def remove(folder: Path) -> None:
    """Remove a folder, whatever the modes of what lies in it."""
    for place, folders, _ in os.walk(folder):
        for name in folders:
            if not (path := Path(place) / name).is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder)


def snapshot(folder: Path, *, without: Collection[str] = ()) -> dict[str, tuple[object, ...]]:
    """Name, kind, size and time of everything below ``folder`` but the names ``without`` at its top."""
    found: dict[str, tuple[object, ...]] = {}
    for place, folders, files in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if name not in without]
            files = [name for name in files if name not in without]
        for name in (*folders, *files):
            path = Path(place) / name
            state = path.lstat()
            time_of = 0 if name in folders else state.st_mtime_ns
            size = 0 if name in folders else state.st_size
            found[str(path.relative_to(folder))] = (state.st_mode, state.st_ino, size, time_of)
    return found


def changes(before: dict[str, tuple[object, ...]], after: dict[str, tuple[object, ...]]) -> list[str]:
    """One complaint that names what two snapshots differ in, or none."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"changed outside of its folder: {', '.join(names[:3])}"] if names else []


def differing(out: Path, reference: Path) -> list[str]:
    """Complaints about files under final names that are not the bytes of ``reference``.

    What tells of time and place only has to be readable.
    """
    found = []
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out)
        if path.is_dir() or _is_passing(name):
            continue
        if not (reference / name).is_file():
            found.append(f"{name} is unknown")
        elif not (_readable(path) if _tells_time(path) else _same(path, reference / name)):
            found.append(f"{name} is half-written or of other bytes")
    return found


def missing(out: Path, reference: Path) -> list[str]:
    """Complaints about files of ``reference`` that are not there."""
    names = (path.relative_to(reference) for path in sorted(reference.rglob("*")) if path.is_file())
    return [f"{name} is missing" for name in names if not _is_passing(name) and not (out / name).is_file()]


def temporaries(folder: Path, *, of: int | None = None) -> list[str]:
    """Complaints about temporary files and locks [of the process ``of`` alone] below ``folder``."""
    names = [".partial-*", *_PASSING] if of is None else [f".partial-*.{of}.*"]
    left = [str(path.relative_to(folder)) for name in names for path in folder.rglob(name)]
    return [f"left behind: {', '.join(left)}"] if left else []


def _is_passing(name: Path) -> bool:
    return any(part.startswith((".partial-", *_PASSING)) for part in name.parts) or name.suffix == ".log"


def _tells_time(path: Path) -> bool:
    measured = ("manifest.json", "report.md", "report.html", "README.md")
    return path.name in measured or path.parent.name == "engine"


def _readable(path: Path) -> bool:
    if path.suffix == ".json":
        with suppress(ValueError):
            return isinstance(json.loads(path.read_bytes()), dict)
        return False
    if path.suffix == ".engine":  # whose builder chooses by timing; without a record it opens nowhere
        record = path.with_suffix(".json")
        return not record.is_file() or json.loads(record.read_bytes())["engine_sha256"] == sha256_of(path)
    return path.suffix != ".html" or path.read_bytes().rstrip().endswith(b"</html>")


def _same(path: Path, other: Path) -> bool:
    if path.name == MARKER:  # a model card joins the others when the job ends
        return marked_names(path.parent) | {CARD} == marked_names(other.parent) | {CARD}
    return path.read_bytes() == other.read_bytes()


def _model(inputs: Path) -> Outcome:
    def write() -> None:
        from builders.tiny import write_tiny

        model = write_tiny(inputs / "llama", "llama-tied")
        _mergeable(model / "tokenizer.json")
        (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")

    return call(write, folder=inputs)


def _mergeable(file: Path) -> None:
    """Let a byte-level tokenizer be one that llama.cpp knows: words cut as Llama 3 does, and one merge."""
    from nirvana_deploy.model.gguf.cuts import BY_PATTERN

    tokenizer = json.loads(file.read_text())
    pattern = next(pattern for pattern, name in BY_PATTERN.items() if name == "llama-bpe")
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["\u0120t"] = len(vocabulary)
    tokenizer["model"] |= {"merges": [["\u0120", "t"]], "ignore_merges": True}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False))


def _sharded(inputs: Path) -> Outcome:
    def write() -> None:
        from builders.tiny import write_tiny

        write_tiny(inputs / "sharded", "qwen3", max_shard_size="60KB")

    return call(write, folder=inputs)


def _texts(inputs: Path) -> Outcome:
    def write() -> None:
        draw = random.Random(0)  # no window of it stands twice
        letters = "abcdefghijklmnopqrstuvwxyz"
        text = " ".join("".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(9000))
        (inputs / "text.txt").write_text(text)

    return call(write, folder=inputs)


def _lines(inputs: Path) -> Outcome:
    def write() -> None:
        lines = (json.dumps({"text": f"Line {number} of a text, " * 8}) + "\n" for number in range(240))
        (inputs / "lines.jsonl").write_text("".join(lines))

    return call(write, folder=inputs)


def _tasks(inputs: Path) -> Outcome:
    def write() -> None:
        question = {"query": "One two", "choices": [" three", " four"], "gold": 0}
        (inputs / "tasks.jsonl").write_text((json.dumps(question) + "\n") * 3)

    return call(write, folder=inputs)


def _recipe(inputs: Path) -> Outcome:
    def write() -> None:
        from builders.jobs import write_short_recipe

        options = {"sparsity": 0.3, "num_sequences": 4, "seq_len": 16, "threads": 1, "calib": "text.txt"}
        more = {"quantize": ("int8", "w4"), "run_benchmark": False}
        path = inputs / "recipe.toml"
        write_short_recipe(Path("llama"), path, **options, **more)

    return call(write, folder=inputs)


def _recovered(inputs: Path) -> Outcome:
    from campaign.subjects.kills import JOB, TRAINED

    return run(*JOB, *TRAINED, "--out", "recovered", folder=inputs)  # the last --out counts


def _searched(inputs: Path) -> Outcome:
    from campaign.subjects.kills import SEARCH

    return run(*SEARCH, "--out", "searched", folder=inputs)


def _with(inputs: Path, made: str) -> Outcome:
    """Let a command of kills.py make ``made`` in a copy of out, under the name that the trials use."""
    from campaign.subjects.kills import AFTER

    command = next(command for command, folder in AFTER.items() if folder == made)
    (inputs / "out").rename(inputs / "kept")
    shutil.copytree(inputs / "kept", inputs / "out")
    done = run(*command, folder=inputs)
    (inputs / "out").rename(inputs / f"with-{made}")
    (inputs / "kept").rename(inputs / "out")
    return done


_MAKERS: dict[str, tuple[Callable[[Path], Outcome], tuple[str, ...]]] = {
    "llama": (_model, ()),
    "sharded": (_sharded, ()),
    "text.txt": (_texts, ()),
    "lines.jsonl": (_lines, ()),
    "tasks.jsonl": (_tasks, ()),
    "recipe.toml": (_recipe, ("llama",)),
    "llama.gguf": (
        lambda inputs: run("package", "llama", "--gguf", "--out", "llama.gguf", folder=inputs),
        ("llama",),
    ),
    "onnx": (lambda inputs: run("export", "llama", "--out", "onnx", folder=inputs), ("llama",)),
    "out": (
        lambda inputs: run("prune-export", "--recipe", "recipe.toml", "--out", "out", folder=inputs),
        ("recipe.toml", "text.txt"),
    ),
    "recovered": (_recovered, ("recipe.toml", "text.txt")),
    "searched": (_searched, ("recipe.toml", "text.txt")),
    "with-gguf": (lambda inputs: _with(inputs, "gguf"), ("out",)),
    "with-triton": (lambda inputs: _with(inputs, "triton"), ("out",)),
    "with-engine": (lambda inputs: _with(inputs, "engine"), ("out",)),
    "engine": (
        lambda inputs: run("build-engine", "onnx", "--max-length", "64", "--out", "engine", folder=inputs),
        ("onnx",),
    ),
}
"""Name of an input -> how to make it in a folder that has the inputs it needs."""
INPUTS = tuple(_MAKERS)
