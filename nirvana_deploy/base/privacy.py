"""No library reports home unless the user says so: their telemetry is off by default.

ONNX Runtime and onnxruntime-genai (since 1.32 and 0.18) keep a device id and send events from a thread of
their own. Each library reads its switch once, while it is imported; child processes inherit it. OpenVINO has
no switch but a package, which it does without where it cannot be imported.
"""

from __future__ import annotations

import os
import sys

SWITCHES = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment variable: the value that turns a library's telemetry off."""

PACKAGES = ("openvino_telemetry",)
"""Packages that do nothing but report."""


def switch_telemetry_off() -> None:
    """Set each switch that the user has not set, in this process and for its children.

    PACKAGES that were not imported before cannot be from then on.
    """
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    for package in PACKAGES:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
