"""Figure of the KL of each layer in int8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import claim, write_bytes

SENSITIVITY_FIGURE = "sensitivity.svg"
"""File name, beside quantization.json."""


_SVG = "http://www.w3.org/2000/svg"


def write_sensitivity(folder: Path, record: Mapping[str, Any]) -> None:
    """Draw the KL per layer beside quantization.json, if it was measured."""
    layers = (record.get("sensitivity") or {}).get("layers")
    if layers:
        from nirvana_deploy.report.pages.layers import sensitivity_figure  # imports matplotlib

        drawing = sensitivity_figure(layers).replace("<svg", f'<svg xmlns="{_SVG}"', 1)
        claim(folder, (SENSITIVITY_FIGURE,))
        write_bytes(folder / SENSITIVITY_FIGURE, drawing.encode())
