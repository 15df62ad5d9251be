from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.roofline import profile as module
from nirvana_deploy.measure.roofline.profile import ELSEWHERE, HEAD, Node, Pass, passes_of, profile_of
from nirvana_deploy.model.checkpoint import Checkpoint

SHORT = Workload(prompt_tokens=9, new_tokens=4)


def event(name: str, operator: str, microseconds: int, *shape: int) -> dict[str, Any]:
    said = {"op_name": operator, "output_type_shape": [{"float": list(shape)}]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": said}


def run(microseconds: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "dur": microseconds}


def test_events_are_taken_apart_into_passes() -> None:
    events = [
        {"cat": "Session", "name": "session_initialization", "dur": 9},
        event("model.layers.0/MatMul_node_3", "MatMul", 5, 1, 8),
        run(7),
        event("lm_head", "MatMul", 6, 1, 11),
        {"cat": "Session", "name": "SequentialExecutor::Execute", "dur": 8},
        run(9),
    ]
    assert list(passes_of(events)) == [
        Pass(7.0, (Node("model.layers.0/MatMul_node_3", "MatMul", 5.0, 8),)),
        Pass(9.0, (Node("lm_head", "MatMul", 6.0, 11),)),
    ]


def test_the_fastest_half_counts_and_the_parts_add_up() -> None:
    def one(slowness: float) -> Pass:
        nodes = (
            Node("model.layers.0/MatMul_1", "MatMul", 100 * slowness, 8),
            Node("model.layers.10/MatMul_2", "MatMul", 200 * slowness, 8),
            Node("model.layers.2/GroupQueryAttention_1", "GroupQueryAttention", 50 * slowness, 8),
            Node("lm_head.matmul", "MatMulNBits", 300 * slowness, 11),
            Node("Cast_1", "Cast", 10 * slowness, 1),
        )
        return Pass(700 * slowness, nodes)

    found = module.summed([[one(1), one(50), one(3), one(60)]], [1.0, 50.0, 3.0, 60.0], 11)
    assert found["passes"] == 2
    assert found["pass_ms"] == 2.0
    assert found["kernels_ms"] == pytest.approx(2 * 0.66)
    assert found["between_ms"] == pytest.approx(2 * 0.04)
    assert found["outside_ms"] == pytest.approx(2.0 - 2 * 0.7)
    operators = [(one["operator"], one["kind"], one["nodes"], one["ms"]) for one in found["operators"]]
    assert operators == [
        ("MatMul", "products", 2, pytest.approx(0.6)),
        ("MatMulNBits", "products", 1, pytest.approx(0.6)),
        ("GroupQueryAttention", "attention", 1, pytest.approx(0.1)),
        ("Cast", "other", 1, pytest.approx(0.02)),
    ]
    assert [one["layer"] for one in found["layers"]] == ["0", "2", "10", ELSEWHERE, HEAD]


@pytest.mark.parametrize("flavor", ["portable", "gqa"])
def test_a_decoder_is_profiled_by_operator_and_layer(flavor: str, tmp_path: Path) -> None:
    model = Checkpoint.open(write_tiny(tmp_path / "model", "llama-tied", head_dim=16))
    onnx_from_checkpoint(model, tmp_path / "onnx", flavor=flavor)
    found = profile_of(tmp_path / "onnx", SHORT, threads=1)
    for phase, passes in (("prefill", 1), ("decode", 4)):  # halves of 3 and 9
        one = found[phase]
        assert one["passes"] == passes
        assert one["kernels_ms"] == pytest.approx(sum(entry["ms"] for entry in one["operators"]))
        assert one["kernels_ms"] == pytest.approx(sum(entry["ms"] for entry in one["layers"]))
        whole = one["kernels_ms"] + one["between_ms"] + one["outside_ms"]
        assert whole == pytest.approx(one["pass_ms"])
        assert min(one["kernels_ms"], one["between_ms"], one["outside_ms"]) > 0
        assert {entry["layer"] for entry in one["layers"]} == {"0", "1", "2", HEAD, ELSEWHERE}
        products = sum(entry["nodes"] for entry in one["operators"] if entry["kind"] == "products")
        assert products == (22 if flavor == "portable" else 13)
    assert not list(tmp_path.glob("**/profile*"))


def test_an_encoder_counts_as_prefill(tmp_path: Path) -> None:
    model = Checkpoint.open(write_t5(tmp_path / "model", "t5"))
    onnx_from_checkpoint(model, tmp_path / "onnx")
    found = profile_of(tmp_path / "onnx", SHORT, threads=1)
    nodes = {
        phase: sum(entry["nodes"] for entry in found[phase]["operators"] if entry["kind"] == "products")
        for phase in found
    }
    assert nodes["prefill"] == nodes["decode"] + 3 * 6  # three layers of q, k, v, o, wi, wo


def test_a_profile_that_ends_early_is_refused() -> None:
    passes = [Pass(1.0, ())] * 7
    with pytest.raises(NirvanaError, match="7 passes for 4 rounds"):
        module._rounds(passes, 4, Path("profile"))
