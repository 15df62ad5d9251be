"""A full disk and exhausted memory are sentences, whoever says them; what fits is let through."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from builders.unix import resource_limits
from onnx import TensorProto, helper
from safetensors.torch import save_file

from nirvana_deploy.base import resources
from nirvana_deploy.base.artifact import whole_file, whole_folder
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.resources import (
    disk_errors,
    exhaustion_errors,
    free_memory_bytes,
    require_free_bytes,
    require_memory,
)

FAR_TOO_MANY = 1 << 50
FULL = Path("/dev/full")  # every write to it finds the disk full


def torch_asks_for_too_much() -> None:
    torch.empty(FAR_TOO_MANY)


def numpy_asks_for_too_much() -> None:
    np.ones(FAR_TOO_MANY)


def python_asks_for_too_much() -> None:
    bytearray(FAR_TOO_MANY * 64)


def onnxruntime_asks_for_too_much() -> None:
    size = helper.make_tensor("size", TensorProto.INT64, [1], [FAR_TOO_MANY])
    node = helper.make_node("ConstantOfShape", ["size"], ["y"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([node], "g", [], [y], initializer=[size])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    session.run(None, {})


def said(within: AbstractContextManager[object], do: Callable[[], object]) -> str:
    """The message of the NirvanaError that ``do`` becomes."""
    with pytest.raises(NirvanaError) as refused, within:
        do()
    return str(refused.value)


@pytest.mark.parametrize(
    "ask",
    [
        torch_asks_for_too_much,
        numpy_asks_for_too_much,
        python_asks_for_too_much,
        onnxruntime_asks_for_too_much,
    ],
)
def test_whoever_runs_out_of_memory_it_is_a_sentence(ask: Callable[[], None]) -> None:
    message = said(exhaustion_errors("The stage 'x'"), ask)
    assert re.match(
        r"The stage 'x' ran out of memory: [\d.,]+ \wB are free now\.\nEnd other programs", message
    )


def test_other_errors_stay_what_they_are() -> None:
    for error in (ValueError("memory of an elephant"), OSError(2, "No such file"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, exhaustion_errors("The command"):
            raise error
        assert raised.value is error
    with pytest.raises(NirvanaError, match="of ours"), exhaustion_errors("The command"):
        raise NirvanaError("of ours: out of memory")


def test_memory_is_compared_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_memory_bytes() < FAR_TOO_MANY
    require_memory(1, what="Nothing")
    message = said(nullcontext(), lambda: require_memory(FAR_TOO_MANY, what="All"))
    assert re.match(r"All needs at least 1,126 TB of memory, and [\d.,]+ \wB are free\.", message)
    monkeypatch.setattr(resources, "_left_to_groups", lambda: iter([7]))
    assert free_memory_bytes() == 7


def test_a_limit_of_the_process_counts() -> None:
    resource_limits()
    code = (
        "import resource; from nirvana_deploy.base.resources import free_memory_bytes\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); print(free_memory_bytes())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(found.stdout) < 1 << 30


def python_writes(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"x" * 1_000_000)


def safetensors_writes(path: Path) -> None:
    save_file({"x": torch.zeros(250_000)}, path)


def torch_writes(path: Path) -> None:
    torch.save({"x": torch.zeros(250_000)}, path)


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("within", [disk_errors, lambda _: exhaustion_errors("The command")])
def test_a_full_disk_is_a_sentence(within: Callable[[Path], AbstractContextManager[None]]) -> None:
    message = said(within(FULL), lambda: python_writes(FULL))
    assert re.match(r"Cannot write /\S+: the disk is full \([\d.,]+ \wB are free\)\.\nFree some", message)


@pytest.mark.parametrize("write", [python_writes, safetensors_writes, torch_writes])
def test_a_file_that_grows_beyond_what_may_be_is_a_sentence_and_gone(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    resource = resource_limits()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    def file() -> None:
        with whole_file(tmp_path / "whole") as partial:
            write(partial)

    def folder() -> None:
        with whole_folder(tmp_path / "whole") as partial:
            write(partial / "inside")

    try:
        for kind in (file, folder):
            message = said(nullcontext(), kind)
            assert re.match(
                r"Cannot write .*/whole: the (file is larger than|disk is full) .*B are free", message
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_is_not_said_to_be_written(tmp_path: Path) -> None:
    gone = tmp_path / "model" / "weights"
    message = said(disk_errors(tmp_path / "out" / "x"), gone.read_bytes)
    assert message == f"{gone} cannot be read: part of the path does not exist."


def test_disk_space_is_compared_before(tmp_path: Path) -> None:
    require_free_bytes(tmp_path / "not" / "there", 1, what="Nothing")
    message = said(nullcontext(), lambda: require_free_bytes(tmp_path, FAR_TOO_MANY, what="All"))
    assert re.match(r"All needs about 1,126 TB on the disk of \S+, which has [\d.,]+ \wB free\.", message)
