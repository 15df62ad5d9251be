from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from builders.tiny import KINDS, write_tiny
from builders.tiny_t5 import write_t5

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import Advance
from nirvana_deploy.export.footprint import footprint_of
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.units.unit_cost import (
    FEWER_GROUPS,
    FEWER_NEURONS,
    WHOLE,
    UnitTime,
    UnitTimes,
    bytes_cost,
    cost_of_times,
    measured_cost,
    smaller_plans,
    times_of_rounds,
    write_stand_in,
)
from nirvana_deploy.measure.worker import RoundSample
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.curves.budget import UnitCost, weight_cost
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization

BY_BYTES = UnitCost(group=600.0, neuron=2.0, measure="bytes")
WHOLE_BLOCKS = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 128,
}
SHORT = Workload(prompt_tokens=4, new_tokens=3, repeats=2, warmup=0, threads=1)


class Notes:
    """Keeps the notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        yield lambda steps: None

    def note(self, text: str) -> None:
        self.lines.append(text)


def _step(ms: float) -> RoundSample:
    return RoundSample(prefill_ms=1.0, ttft_ms=1.0, itl_ms=(ms, ms, ms, 9 * ms))


def _times(group: tuple[float, float] | None, neuron: tuple[float, float]) -> UnitTimes:
    return UnitTimes(
        group=None if group is None else UnitTime(*group), neuron=UnitTime(*neuron), layers=4, step_ms=1.0
    )


@pytest.mark.parametrize("scheme", [None, "w4"])
def test_bytes_are_those_that_the_onnx_files_differ_by(tmp_path: Path, scheme: str | None) -> None:
    """Of a model whose widths are whole blocks."""
    source = Checkpoint.open(write_tiny(tmp_path / "seed", "llama-tied"))
    config = source.config | WHOLE_BLOCKS
    whole = write_stand_in(replace(source, config=config), tmp_path / "whole", layers=2)
    context_tokens = 10

    def step_bytes(checkpoint: Checkpoint, name: str) -> int:
        folder = tmp_path / f"onnx-{name}"
        onnx_from_checkpoint(checkpoint, folder)
        if scheme is not None:
            quantize_onnx(folder, tmp_path / f"low-{name}", Quantization(scheme=scheme, rounding="plain"))
            folder = tmp_path / f"low-{name}"
        read = footprint_of(folder)
        return read.weight_bytes_per_step + context_tokens * read.kv_cache_bytes_per_token

    dense = step_bytes(whole, "whole")
    cost = bytes_cost(whole.shape, scheme=scheme, dtype="fp32", context_tokens=context_tokens)
    for name, plan in smaller_plans(whole.shape).items():
        slice_checkpoint(whole, plan, tmp_path / name)
        fewer = dense - step_bytes(Checkpoint.open(tmp_path / name), name)
        budget = plan.budget
        assert fewer == budget.removed_groups * cost.group + budget.removed_neurons * cost.neuron


def test_without_a_context_bytes_are_proportional_to_weights(tmp_path: Path) -> None:
    shape = Checkpoint.open(write_tiny(tmp_path, "qwen2")).shape
    weights = weight_cost(shape)
    for scheme, weight_bytes in ((None, 2.0), ("w8", 1.0), ("w4", 0.5 + 2 / 32)):
        cost = bytes_cost(shape, scheme=scheme, dtype="fp16", context_tokens=0)
        assert cost == UnitCost(weights.group * weight_bytes, weights.neuron * weight_bytes, "bytes")


def test_an_unknown_scheme_or_dtype_is_refused(tmp_path: Path) -> None:
    shape = Checkpoint.open(write_tiny(tmp_path, "llama-tied")).shape
    with pytest.raises(NirvanaError, match="w4"):
        bytes_cost(shape, scheme="w5", dtype="fp32", context_tokens=0)
    with pytest.raises(NirvanaError, match="fp16"):
        bytes_cost(shape, scheme=None, dtype="fp12", context_tokens=0)


@pytest.mark.parametrize("kind", [*KINDS, "olmo2"])
def test_a_stand_in_has_the_dimensions_of_its_model(tmp_path: Path, kind: str) -> None:
    dense = Checkpoint.open(write_tiny(tmp_path / "dense", kind))
    stand_in = write_stand_in(dense, tmp_path / "stand-in", layers=2)
    assert stand_in.shape == replace(dense.shape, layers=dense.shape.layers[:2], vocab_size=1024)
    for plan in smaller_plans(stand_in.shape).values():
        slice_checkpoint(stand_in, plan, tmp_path / "smaller")
        onnx_from_checkpoint(Checkpoint.open(tmp_path / "smaller"), tmp_path / "onnx")


def test_a_stand_in_of_a_pruned_model_is_that_of_the_dense_one(tmp_path: Path) -> None:
    dense = Checkpoint.open(write_tiny(tmp_path / "dense", "llama-tied"))
    plan = smaller_plans(dense.shape)[FEWER_NEURONS]
    slice_checkpoint(dense, replace(plan, allocation="global"), tmp_path / "pruned")
    pruned = Checkpoint.open(tmp_path / "pruned")
    assert "per_layer_config" in pruned.config
    of_pruned = write_stand_in(pruned, tmp_path / "a", layers=2)
    assert of_pruned.shape == write_stand_in(dense, tmp_path / "b", layers=2).shape


def test_times_of_units_are_paired_differences_whatever_the_drift() -> None:
    drift = (1.0, 1.5, 2.5, 40.0, 3.0)
    samples = {
        WHOLE: [_step(10 + d) for d in drift],
        FEWER_GROUPS: [_step(8 + d) for d in drift],
        FEWER_NEURONS: [_step(7 + d) for d in drift],
    }
    times = times_of_rounds(samples, {FEWER_GROUPS: 4, FEWER_NEURONS: 30}, layers=2)
    assert times.group is not None
    assert times.group.ms == pytest.approx(0.5) and times.group.error_ms == pytest.approx(0, abs=1e-12)
    assert times.neuron.ms == pytest.approx(0.1) and times.neuron.measured
    assert times.step_ms == pytest.approx(12.5)


def test_both_kinds_measured_are_milliseconds() -> None:
    notes = Notes()
    cost = cost_of_times(_times((0.4, 0.01), (0.002, 0.0001)), BY_BYTES, progress=notes)
    assert cost == UnitCost(group=0.4, neuron=0.002, measure="ms")
    assert not notes.lines


def test_what_does_not_stand_out_counts_by_bytes_and_a_note_says_so() -> None:
    notes = Notes()
    cost = cost_of_times(_times((0.4, 0.3), (0.002, 0.0001)), BY_BYTES, progress=notes)
    assert cost == UnitCost(group=pytest.approx(0.6), neuron=0.002, measure="ms")
    cost = cost_of_times(_times((0.4, 0.01), (-0.002, 0.0001)), BY_BYTES, progress=notes)
    assert cost == UnitCost(group=0.4, neuron=pytest.approx(0.4 / 300), measure="ms")
    assert cost_of_times(_times((-0.1, 0.0), (0.002, 0.01)), BY_BYTES, progress=notes) == BY_BYTES
    assert ["KV group takes 0.4 ms" in notes.lines[0], "neuron takes" in notes.lines[1]] == [True, True]
    assert "bytes" in notes.lines[2] and len(notes.lines) == 3


def test_the_group_of_one_kv_head_takes_its_share_in_silence() -> None:
    notes = Notes()
    cost = cost_of_times(_times(None, (0.002, 0.0001)), BY_BYTES, progress=notes)
    assert cost == UnitCost(group=pytest.approx(0.6), neuron=0.002, measure="ms") and not notes.lines


def test_encoder_decoders_and_bf16_fall_back_to_bytes(tmp_path: Path) -> None:
    t5 = Checkpoint.open(write_t5(tmp_path / "t5", "t5"))
    llama = Checkpoint.open(write_tiny(tmp_path / "llama", "llama-tied"))
    for checkpoint, dtype, reason in ((t5, "fp32", "encoder"), (llama, "bf16", "bfloat16")):
        notes = Notes()
        cost = measured_cost(
            checkpoint, scheme=None, dtype=dtype, flavor="portable", workload=SHORT, progress=notes
        )
        assert cost == bytes_cost(checkpoint.shape, scheme=None, dtype=dtype, context_tokens=5.5)
        assert reason in notes.lines[0]


@pytest.mark.integration
@pytest.mark.parametrize("scheme", ["int8", "w4"])
def test_a_model_is_timed_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    checkpoint = Checkpoint.open(write_tiny(tmp_path / "model", "llama-tied"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    cost = measured_cost(checkpoint, scheme=scheme, dtype="fp32", flavor="portable", workload=SHORT)
    assert cost.group > 0 and cost.neuron > 0 and cost.measure in {"ms", "bytes"}
    assert not list(scratch.iterdir())
