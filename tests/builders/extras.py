"""Optional packages of the tests, and the extra of ours that installs each."""

from __future__ import annotations

from typing import Any

import pytest

EXTRAS = {
    "cuda": ("cuda-bindings", "rtx"),
    "fastapi": ("fastapi", "serve"),
    "furo": ("furo", "docs"),
    "gguf": ("gguf", "gguf"),
    "hypothesis": ("hypothesis", "test"),
    "jsonschema": ("jsonschema", "test"),
    "llama_cpp": ("llama-cpp-python", "llama-cpp"),
    "lm_eval": ("lm-eval", "eval"),
    "myst_parser": ("myst-parser", "docs"),
    "openai": ("openai", "test"),
    "onnxruntime_genai": ("onnxruntime-genai", "genai"),
    "openvino": ("openvino", "openvino"),
    "openvino_genai": ("openvino-genai", "openvino"),
    "openvino_tokenizers": ("openvino-tokenizers", "openvino"),
    "peft": ("peft", "recover"),
    "prometheus_client": ("prometheus-client", "serve"),
    "ray": ("ray", "cluster"),
    "sphinx": ("sphinx", "docs"),
    "tensorboard": ("tensorboard", "recover"),
    "tensorrt_rtx": ("tensorrt-rtx", "rtx"),
    "tritonclient": ("tritonclient", "test"),
    "uvicorn": ("uvicorn", "serve"),
}
"""Top-level module: its package, our extra."""


def needs(module: str) -> Any:
    """Import ``module``, or skip the file or test that asks, with the command that installs it."""
    __tracebackhide__ = True
    package, extra = EXTRAS[module.partition(".")[0]]
    return pytest.importorskip(module, reason=f"needs {package}: pip install 'nirvana-deploy[{extra}]'")
