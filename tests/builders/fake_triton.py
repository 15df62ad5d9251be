"""Stand-ins for what Triton's Python backend gives a model: tensors, requests, senders, its utilities."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from numpy.typing import NDArray

from builders.extras import needs

model_config_pb2: Any = needs("tritonclient.grpc.model_config_pb2")
_DTYPES = {"TYPE_STRING": np.object_, "TYPE_INT32": np.int32, "TYPE_BOOL": np.bool_, "TYPE_FP32": np.float32}


@dataclass
class FakeTensor:
    """pb_utils.Tensor, as far as a model may rely on it."""

    name: str
    array: NDArray[Any]

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass
class FakeResponse:
    output_tensors: list[FakeTensor] = field(default_factory=list)
    error: Exception | None = None

    def of(self, name: str) -> NDArray[Any]:
        return {tensor.name: tensor.array for tensor in self.output_tensors}[name]


@dataclass
class FakeSender:
    sent: list[FakeResponse] = field(default_factory=list)
    finished: bool = False
    cancel_after: int | None = None

    def send(self, response: FakeResponse | None = None, flags: int = 0) -> None:
        assert not self.finished, "Triton refuses what comes after the final flag"
        assert response is not None or flags
        self.sent += [response] if response is not None else []
        self.finished = bool(flags)

    def is_cancelled(self) -> bool:
        return self.cancel_after is not None and len(self.sent) >= self.cancel_after


@dataclass
class FakeRequest:
    inputs: dict[str, Any]
    sender: FakeSender = field(default_factory=FakeSender)

    def get_response_sender(self) -> FakeSender:
        return self.sender


def parsed(repository: Path, model: str) -> Any:
    """config.pbtxt by the schema; unknown fields and wrong types are errors."""
    text = (repository / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def pretend_triton(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    """Make ``triton_python_backend_utils`` importable, for a model of this configuration."""
    declared = {tensor.name: model_config_pb2.DataType.Name(tensor.data_type) for tensor in config.input}

    def get_input(request: FakeRequest, name: str) -> FakeTensor | None:
        dtype = _DTYPES[declared[name]]  # a KeyError for an input that config.pbtxt does not declare
        if name not in request.inputs:
            return None
        value = request.inputs[name]
        return FakeTensor(name, np.array([value.encode() if isinstance(value, str) else value], dtype=dtype))

    utils = ModuleType("triton_python_backend_utils")
    utils.__dict__.update(
        get_input_tensor_by_name=get_input,
        Tensor=FakeTensor,
        InferenceResponse=FakeResponse,
        TritonError=RuntimeError,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)


def load(path: Path) -> Any:
    """A model.py as a module."""
    spec = importlib.util.spec_from_file_location("triton_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(repository: Path, config: Any) -> dict[str, str]:
    """What Triton calls ``initialize`` with."""
    return {
        "model_config": json_format.MessageToJson(config, preserving_proto_field_name=True),
        "model_instance_device_id": "0",
        "model_repository": str(repository / config.name),
        "model_version": "1",
    }


def ask(model: Any, **inputs: Any) -> FakeSender:
    """One request, answered."""
    request = FakeRequest(inputs)
    model.execute([request])
    assert request.sender.finished
    return request.sender
