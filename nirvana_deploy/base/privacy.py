"""No library reports home unless the user says so: their telemetry is off by default.

ONNX Runtime and onnxruntime-genai (since 1.32 and 0.18) keep a device id and send events from a thread of
their own. Each library reads its switch once, while it is imported; child processes inherit it.
"""

from __future__ import annotations

import os

SWITCHES = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment variable: the value that turns a library's telemetry off."""


def switch_telemetry_off() -> None:
    """Set each switch that the user has not set, in this process and for its children."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
