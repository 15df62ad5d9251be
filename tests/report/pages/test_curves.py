"""The figure of curves: every layer a bar, the plan above it, gaps where nothing can go."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.output.layout import CURVES_FILE
from nirvana_deploy.output.records import LayerWidth
from nirvana_deploy.prune.curves.curve import Curves, curve_of, write_curves
from nirvana_deploy.report.pages.curves import curves_figure, curves_of

NOTHING = curve_of([0], [0.0])


def layer(number: int, *, groups: int = 3, neurons: int = 40, site: str | None = None) -> LayerWidth:
    return LayerWidth(number, groups, tuple(range(max(1, groups - 1))), neurons, neurons // 2, site)


def curves(scales: list[float]) -> Curves:
    return Curves(
        groups=tuple(curve_of([0, 1, 2], [0, 0.01 * s, 0.1 * s]) for s in scales),
        neurons=tuple(curve_of([0, 8, 16, 32], [0, 0.001 * s, 0.005 * s, 0.1 * s]) for s in scales),
        facts={},
    )


def test_it_is_well_formed_and_names_the_extremes() -> None:
    found, layers = curves([3.0, 1.0, 2.0]), [layer(number) for number in range(3)]
    svg = curves_figure(found, layers)
    ElementTree.fromstring(svg)
    assert "Attention: predicted KL without one KV group: least in layer 1 (0.0100 nats)" in svg
    assert "most in layer 0 (0.0300 nats)" in svg
    # 12 of 40 neurons: half way between the points at 8 and 16
    assert "FFN: predicted KL without 30% of neurons: least in layer 1 (0.00300 nats)" in svg
    assert "var(--first," in svg and "var(--second," in svg
    assert curves_figure(found, layers) == svg


def test_sites_that_cannot_lose_units_have_no_bar() -> None:
    flat = Curves((NOTHING, NOTHING), (NOTHING, NOTHING), {})
    svg = curves_figure(flat, [layer(0, groups=1), layer(0, neurons=0, site="cross")])
    ElementTree.fromstring(svg)
    assert svg.count("no layer can lose that much") == 2


def test_losses_of_nothing_are_drawn_at_the_foot() -> None:
    ElementTree.fromstring(curves_figure(curves([0.0, 0.0]), [layer(0), layer(1)]))


def test_an_output_folder_may_have_no_curves_or_those_of_another_model(tmp_path: Path) -> None:
    layers = [layer(0), layer(1)]
    assert curves_of(tmp_path, layers) is None
    write_curves(curves([1.0, 2.0]), tmp_path / CURVES_FILE)
    found = curves_of(tmp_path, layers)
    assert found is not None and found.groups[1].at(1) == pytest.approx(0.02)
    assert curves_of(tmp_path, layers[:1]) is None
    (tmp_path / CURVES_FILE).write_bytes(b"no curves")
    with pytest.raises(NirvanaError, match="no safetensors file of this tool"):
        curves_of(tmp_path, layers)
