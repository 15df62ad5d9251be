"""The figure of a selection: every candidate a dot, the winner named, same numbers same bytes."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from nirvana_deploy.report.figures import selection_figure


def selection(kls: list[float], *, separable: bool = True) -> dict[str, Any]:
    order = sorted(range(len(kls)), key=kls.__getitem__)
    return {
        "heldout": {"sources": ["pydoc"], "windows": 128, "tokens": 8192},
        "kl": {"min": min(kls), "median": sorted(kls)[len(kls) // 2], "max": max(kls)},
        "winner": order[0],
        "runner_up": order[1] if len(order) > 1 else None,
        "separable": separable,
        "candidates": [
            {"name": f"pydoc 0.{i} $nirvana$ <b> gamma 3", "saliency": ("nirvana", "taylor")[i % 2], "kl": kl}
            for i, kl in enumerate(kls)
        ],
    }


@pytest.mark.parametrize("kls", [[1.4, 1.2, 1.5, 1.3], [1.4], [0.0], [1.2, 1.2]])
def test_it_is_well_formed_and_names_the_winner(kls: list[float]) -> None:
    svg = selection_figure(selection(kls))
    ElementTree.fromstring(svg)
    winner = kls.index(min(kls))
    assert f"pydoc 0.{winner} $nirvana$ &lt;b&gt; gamma 3" in svg and "8,192 held-out tokens" in svg
    assert selection_figure(selection(kls)) == svg


def test_the_alternative_text_says_how_sure_it_is() -> None:
    assert "by no more than chance" in selection_figure(selection([1.0, 1.1], separable=False))
    assert "by more than chance" in selection_figure(selection([1.0, 1.1]))
    assert "chance" not in selection_figure(selection([1.0]))
