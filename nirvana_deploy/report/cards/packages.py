"""Cards of packages: what the ONNX model's card says, and what its package is and how it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nirvana_deploy.base.reading import read_json
from nirvana_deploy.model.snapshot import name_of
from nirvana_deploy.model.text.source_card import legal_files, source_card
from nirvana_deploy.output.kinds.speculative import SpeculativeRecord
from nirvana_deploy.output.layout import SPECULATIVE_FILE, is_speculative
from nirvana_deploy.report.cards.card import Card
from nirvana_deploy.report.cards.snippets import draft_snippets, openvino_snippets
from nirvana_deploy.report.pages.speculative import says

_DRAFTS = "onnxruntime-genai needs version 0.18: older ones take no draft."
_HALF = "Weights that were float32 are float16 here, and openvino-genai computes as OpenVINO chooses."
_OF_ONNX = ("onnxruntime-genai needs", "OpenVINO does not load")
"""How limits of the ONNX folder begin that its package does not have."""


def package_card(card: Card, folder: Path) -> Card:
    """``card``, of an ONNX folder, as that of ``folder``: its package for openvino-genai or with a draft."""
    limits = [one for one in card.limits if not one.startswith(_OF_ONNX)]
    common: dict[str, Any] = {
        "legal_files": tuple(file.name for file in legal_files(folder)),
        "measured_says": f"{card.measured_says} Measured on the ONNX model by itself."
        if card.measured_says
        else "",
    }
    title = card.title.replace(", ONNX", "")
    if is_speculative(folder):
        record: Mapping[str, Any] = read_json(folder / SPECULATIVE_FILE, SpeculativeRecord)
        return replace(
            card,
            title=f"{title}, with a draft",
            intro=(*card.intro, "A smaller model proposes its tokens.", *says(record)),
            snippets=draft_snippets(),
            limits=(_DRAFTS, *limits),
            **common,
        )
    return replace(
        card,
        title=f"{title}, OpenVINO",
        form="openvino",
        intro=(*card.intro, "Written as an OpenVINO model for openvino-genai."),
        snippets=openvino_snippets(),
        limits=(_HALF, *limits),
        **common,
    )


def source_of_alone(onnx: Path) -> dict[str, Any]:
    """What a folder outside of any run says of its model, as a manifest's record of one."""
    return {"name": name_of(onnx.resolve()), "card": source_card(onnx)}
