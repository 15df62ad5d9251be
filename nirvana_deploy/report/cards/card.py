"""The text of one model card: YAML front matter as the hub reads it, then the page.

The same facts give the same bytes, and none of them names a place on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub import ModelCardData
from markupsafe import Markup

from nirvana_deploy import __version__
from nirvana_deploy.base.ownership.marker import CARD_NOTE, TOOL
from nirvana_deploy.report.facts import Facts
from nirvana_deploy.report.page import markdown_environment
from nirvana_deploy.report.snippets import Snippet
from nirvana_deploy.report.table import Table

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENCES = {
    "Llama 3.1 Community": "llama3.1",
    "Llama 3.2 Community": "llama3.2",
    "Gemma Terms of Use": "gemma",
}
"""Names of licences, where the hub has another name than their own in small letters."""
_OPEN_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class Source:
    """The model that a folder was made from, as its card may say it."""

    name: str
    base_model: str | None
    """Its hub id; None where nobody knows one."""
    told: Mapping[str, str | list[str]]
    """Of the front matter of its own card: licence, languages, task."""
    licence: str | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Source:
        """From what the manifest says of the model; its path stays behind."""
        told = record.get("card") or {}
        base = record.get("hub_id") or told.get("base_model") or _from_origin(record.get("origin"))
        known = base if isinstance(base, str) and _HUB_ID.fullmatch(base) else None
        return cls(str(record.get("name") or "model"), known, told, record.get("licence"))

    @property
    def licence_entries(self) -> dict[str, Any]:
        """``license`` and what belongs to it, as the hub has them; empty where nobody says."""
        keys = ("license", "license_name", "license_link")
        if "license" in self.told:
            return {key: self.told[key] for key in keys if key in self.told}
        if self.licence is None:
            return {}
        name = _LICENCES.get(self.licence, self.licence.lower())
        if _OPEN_LICENCE.fullmatch(name):
            return {"license": name}
        return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", name).strip("-")}


def _from_origin(origin: Any) -> str | None:
    """The hub id in an origin that names one."""
    words = str(origin or "").split(" ")
    return words[words.index("hub") + 1] if "hub" in words[:-1] else None


@dataclass(frozen=True)
class Card:
    """What the card of one folder says."""

    title: str
    source: Source
    form: Literal["checkpoint", "onnx", "openvino"]
    pruned: bool
    encoder_decoder: bool
    intro: tuple[str, ...]
    """Sentences."""
    recipe: Facts
    snippets: tuple[Snippet, ...]
    limits: tuple[str, ...]
    legal_files: tuple[str, ...]
    scheme: str | None = None
    measured: Table | None = None
    measured_says: str = ""
    kinds: Table | None = None


def card_text(card: Card) -> str:
    """The README.md of a folder."""
    template = markdown_environment().get_template("card.md.j2")
    base = card.source.base_model
    return template.render(
        card=card,
        front_matter=Markup(_front_matter(card)),
        note=Markup(CARD_NOTE),
        base=None if base is None else Markup(f"[{base}](https://huggingface.co/{base})"),
        licence=", ".join(str(value) for value in card.source.licence_entries.values()),
        tool=f"{TOOL} {__version__}",
    )


def _front_matter(card: Card) -> str:
    told = card.source.told
    task = "text2text-generation" if card.encoder_decoder else "text-generation"
    tags = [TOOL, *(["pruned", "structured-pruning"] if card.pruned else [])]
    tags += [card.form] if card.form != "checkpoint" else []
    tags += [card.scheme] if card.scheme else []
    entries: dict[str, Any] = {
        "base_model": card.source.base_model,
        **card.source.licence_entries,
        "library_name": "transformers" if card.form == "checkpoint" else card.form,
        "pipeline_tag": told.get("pipeline_tag") or task,
        "language": told.get("language"),
        "tags": tags,
    }
    if card.scheme and card.source.base_model:
        entries["base_model_relation"] = "quantized"
    data = ModelCardData(**entries)
    return data.to_yaml(line_break="\n")
