"""Models and folders as arguments: what a shell completes, and what was perhaps meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from nirvana_deploy.base.registry import nearest_names
from nirvana_deploy.output.layout import MANIFEST, MODEL_FILE

CONFIG = "config.json"
"""What a folder with a model holds."""


class Model(click.ParamType[str]):
    """An alias, a hub id, a folder with a model, or a .gguf file."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """What it is, the library finds out."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Aliases, and folders and files with a model."""
        from nirvana_deploy.model.sources import ALIASES

        names = [name for name in ALIASES if name.startswith(incomplete)]
        found = [*names, *_entries(incomplete, holding=[CONFIG], suffixes=[".gguf"])]
        return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="file")]


class Folder(click.Path):
    """A folder that holds one of some files: an output folder unless others are named."""

    def __init__(self, *holding: str, files: Sequence[str] = (), exists: bool = True) -> None:
        super().__init__(exists=exists, file_okay=bool(files), path_type=Path)
        self._holding, self._suffixes = holding or (MANIFEST,), files

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what does not exist, with the nearest folder of this kind."""
        path = Path(value)
        if self.exists and not path.exists():
            near = list(
                _entries(f"{path.parent}/" if len(path.parts) > 1 else "", self._holding, self._suffixes)
            )
            close = nearest_names(str(path), near)
            guess = f" Did you mean {' or '.join(close)}?" if close else ""
            self.fail(f"{self._kind} {str(value)!r} does not exist.{guess}", param, ctx)
        return super().convert(value, param, ctx)

    @property
    def _kind(self) -> str:
        return "Path" if self.file_okay else "Folder"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Folders of this kind; where there is none, any."""
        found = [CompletionItem(name) for name in _entries(incomplete, self._holding, self._suffixes)]
        return found or [CompletionItem(incomplete, type="file" if self.file_okay else "dir")]


OUTPUT = Folder()
"""An output folder."""
OUTPUT_OR_ONNX = Folder(MANIFEST, MODEL_FILE)
OUTPUT_OR_MODEL = Folder(MANIFEST, MODEL_FILE, CONFIG)
"""Or an ONNX folder, or a checkpoint."""
OUTPUT_MODEL_OR_ENGINE = Folder(MANIFEST, MODEL_FILE, CONFIG, files=[".engine"])
CONTENDER = Folder(MANIFEST, MODEL_FILE, CONFIG, files=[".engine", ".gguf"], exists=False)
"""What ``benchmark`` times; OUT:VARIANT is no path, so the library finds out what exists."""
MEASURED = Folder(files=[".json"])
"""An output folder, or the record of a benchmark."""
DESCRIBED = Folder(files=[".engine", ".json"], exists=False)
"""What ``inspect`` describes: an output folder, a plan, an engine."""


def suggesting(names: Callable[[], Iterable[str]]) -> Callable[..., list[CompletionItem]]:
    """Complete the last of several names separated by commas, or a path."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        found = [f"{before}{comma}{name}" for name in names() if name.startswith(last)]
        return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="file")]

    return complete


def _entries(incomplete: str, holding: Sequence[str], suffixes: Sequence[str]) -> Iterator[str]:
    """Folders that hold one of some files, and files with a suffix, as they are typed."""
    typed, slash, _ = incomplete.rpartition("/")
    try:
        children = sorted(Path(typed + slash or ".").expanduser().iterdir())
    except OSError:
        return
    for child in children:
        name = f"{typed}{slash}{child.name}"
        if child.name.startswith(".") or not name.startswith(incomplete):
            continue
        if child.suffix in suffixes or any((child / file).is_file() for file in holding):
            yield name
