"""curves.safetensors: read back as written; what is damaged, or measured on something else, is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.curves.curve import (
    SCHEMA,
    Curve,
    Curves,
    curve_of,
    read_curves,
    write_curves,
)
from nirvana_deploy.prune.curves.facts import facts_of, require_curves_of


@pytest.fixture
def curves(tiny_llama: Path, tokens: NDArray[np.int64]) -> Curves:
    return Curves(
        groups=tuple(curve_of([0, 1, 2], [0, 0.1 * n, 0.3 * n]) for n in range(12)),
        neurons=tuple(curve_of([0, 10, 24], [0, 0.01, 0.07 + n]) for n in range(12)),
        facts=facts_of(Checkpoint.open(tiny_llama), tokens),
    )


def test_curves_are_read_as_they_were_written_and_bytes_are_the_same(curves: Curves, tmp_path: Path) -> None:
    write_curves(curves, tmp_path / "a")
    found = read_curves(tmp_path / "a")
    assert found.facts == curves.facts
    for one, other in zip(found.groups + found.neurons, curves.groups + curves.neurons, strict=True):
        assert one.removed.dtype == np.int64 and one.kl.dtype == np.float64
        np.testing.assert_array_equal(one.removed, other.removed)
        np.testing.assert_array_equal(one.kl, other.kl)
    for _ in range(8):  # what depends on a hash differs in one of a few
        write_curves(found, tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_losses_ascend_scale_and_lie_on_straight_lines() -> None:
    curve = curve_of([0, 2, 4, 8], [0.0, 1.0, 0.5, 3.0])
    assert curve.kl.tolist() == [0, 1, 1, 3]
    assert [curve.at(removed) for removed in (0, 1, 3, 6, 8)] == [0, 0.5, 1, 2, 3]
    assert curve.scaled(2).kl.tolist() == [0, 2, 2, 6] and curve.kl.tolist() == [0, 1, 1, 3]


def refusal(path: Path) -> str:
    with pytest.raises(NirvanaError) as refused:
        read_curves(path)
    if path.exists():
        assert (refused.value.hint or "").startswith("Measure the curves again")
    assert str(path) in refused.value.message
    return refused.value.message


def test_files_without_curves_are_refused(curves: Curves, tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none")
    (tmp_path / "text").write_text("no curves")
    assert "no safetensors file" in refusal(tmp_path / "text")
    write_curves(curves, tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    assert "no safetensors file" in refusal(tmp_path / "half")
    some: dict[str, NDArray[Any]] = {"00000.groups.removed": np.arange(2), "00000.groups.kl": np.zeros(2)}
    save_file(some, tmp_path / "weights")
    assert "holds no curves of this version" in refusal(tmp_path / "weights")
    later = json.dumps({"schema": SCHEMA.replace("1", "2")})
    save_file(some, tmp_path / "later", metadata={"curves": later})
    assert "holds no curves of this version" in refusal(tmp_path / "later")


@pytest.mark.parametrize(
    ("removed", "kl"),
    [
        ([], []),
        ([1, 2], [0.0, 1.0]),
        ([0, 2, 2], [0.0, 1.0, 2.0]),
        ([0, 2, 1], [0.0, 1.0, 2.0]),
        ([0, 1], [0.0, np.nan]),
        ([0, 1], [0.0, np.inf]),
        ([0, 1, 2], [0.0, 2.0, 1.0]),
        ([0, 1, 2], [0.0, 1.0]),
        ([0, 1], [0.5, 1.0]),
    ],
)
def test_curves_that_do_not_ascend_from_zero_are_named(
    curves: Curves, tmp_path: Path, removed: list[int], kl: list[float]
) -> None:
    bad = Curve(np.array(removed, dtype=np.int64), np.array(kl, dtype=np.float64))
    neurons = (*curves.neurons[:2], bad, *curves.neurons[3:])
    write_curves(Curves(curves.groups, neurons, curves.facts), tmp_path / "c")
    assert "the curve for neurons of layer 2 must start at 0" in refusal(tmp_path / "c")


def test_curves_without_one_half_are_refused(tmp_path: Path) -> None:
    half = {"00000.neurons.kl": np.zeros(1)}
    save_file(half, tmp_path / "c", metadata={"curves": json.dumps({"schema": SCHEMA})})
    assert "the curve for neurons of layer 0 must start at 0" in refusal(tmp_path / "c")


def test_curves_of_another_model_or_other_windows_are_refused(
    curves: Curves, tiny_llama: Path, tokens: NDArray[np.int64]
) -> None:
    facts, path = facts_of(Checkpoint.open(tiny_llama), tokens), Path("curves.safetensors")
    require_curves_of(curves, facts, path)
    other = facts_of(Checkpoint.open(tiny_llama), tokens[::-1])
    with pytest.raises(NirvanaError, match=r"curves\.safetensors was measured on other calibration windows"):
        require_curves_of(curves, other, path)
    for key, value in (("family", "gemma3"), ("hidden_size", "96"), ("layers", "[]")):
        with pytest.raises(NirvanaError, match=f"measured on another model: {key} is"):
            require_curves_of(curves, {**facts, key: value}, path)


def test_facts_tell_models_and_windows_apart(tiny: Path, tokens: NDArray[np.int64]) -> None:
    facts = facts_of(Checkpoint.open(tiny), tokens)
    assert facts == facts_of(Checkpoint.open(tiny), np.asfortranarray(tokens))
    longer = facts_of(Checkpoint.open(tiny), np.concatenate([tokens, tokens]))
    assert {key for key in facts if facts[key] != longer[key]} == {"windows_sha256"}


def test_files_that_say_nothing_of_the_weights_are_read_where_nothing_contradicts(
    curves: Curves, tiny_llama: Path, tokens: NDArray[np.int64]
) -> None:
    facts, path = facts_of(Checkpoint.open(tiny_llama), tokens), Path("curves.safetensors")
    earlier = {key: value for key, value in facts.items() if key != "weights_sample_sha256"}
    require_curves_of(replace(curves, facts=earlier), facts, path)
    with pytest.raises(NirvanaError, match="a model of the same shape and other weights"):
        require_curves_of(replace(curves, facts={**facts, "weights_sample_sha256": "0"}), facts, path)
