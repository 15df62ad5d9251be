"""The figure of what each layer costs in int8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import write_bytes

SENSITIVITY_FIGURE = "sensitivity.svg"
"""Beside quantization.json."""


_SVG = "http://www.w3.org/2000/svg"


def write_sensitivity(folder: Path, record: Mapping[str, Any]) -> None:
    """Draw what each layer costs, where that was measured, beside the quantization.json that has it."""
    layers = (record.get("sensitivity") or {}).get("layers")
    if layers:
        from nirvana_deploy.report.figures import sensitivity_figure  # imports matplotlib

        drawing = sensitivity_figure(layers).replace("<svg", f'<svg xmlns="{_SVG}"', 1)
        write_bytes(folder / SENSITIVITY_FIGURE, drawing.encode())
