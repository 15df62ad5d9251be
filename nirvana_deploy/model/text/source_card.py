"""What a model says of itself to people: the front matter of its README.md, and the files of its licence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nirvana_deploy.base.ownership.marker import CARD
from nirvana_deploy.model.snapshot import lies_within

LEGAL_KINDS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
"""What the names of files begin with that go where the weights go."""
_LEGAL_ENDINGS = ("", ".txt", ".md", ".pdf")
_MOST_BYTES = 1 << 20
_TOLD = ("base_model", "license", "license_name", "license_link", "language", "pipeline_tag")
"""Keys of a card's front matter that hold for what is made of the model too."""
_LONGEST, _MOST_VALUES = 200, 50


def legal_files(folder: Path) -> tuple[Path, ...]:
    """Licence, notice and use policy in a model's folder, if any, sorted."""

    def is_legal(file: Path) -> bool:
        return (
            file.name.upper().startswith(LEGAL_KINDS)
            and file.suffix.lower() in _LEGAL_ENDINGS
            and file.is_file()
            and lies_within(file, folder)
            and file.stat().st_size <= _MOST_BYTES
        )

    return tuple(sorted(file for file in folder.iterdir() if is_legal(file)))


def source_card(folder: Path) -> dict[str, str | list[str]]:
    """What the card of a model's folder says of its base, licence, languages and task.

    A card that cannot be read says nothing: it is a page for people.
    """
    card = folder / CARD
    if not card.is_file() or not lies_within(card, folder) or card.stat().st_size > _MOST_BYTES:
        return {}
    from huggingface_hub.repocard import metadata_load

    try:
        said: Any = metadata_load(card)
    except Exception:  # of any kind: YAML, UTF-8, nesting
        return {}
    return dict(_told(said if isinstance(said, dict) else {}))


def _told(said: dict[str, Any]) -> Iterator[tuple[str, str | list[str]]]:
    for key in _TOLD:
        value: Any = said.get(key)
        if _is_text(value):
            yield key, value
        elif isinstance(value, list) and value and all(map(_is_text, value[:_MOST_VALUES])):
            yield key, value[:_MOST_VALUES]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable()
