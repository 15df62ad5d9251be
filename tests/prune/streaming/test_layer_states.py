"""Hidden states between layers: the same in memory and on disk, and nothing stays behind."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.saliency.units import UnitScores
from nirvana_deploy.prune.streaming.layer_states import LayerStates
from nirvana_deploy.prune.streaming.score import score_units

SHAPES = [(2, 5, 4), (2, 5, 4), (1, 5, 4)]
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("spill", [False, True])
def test_what_was_put_comes_back(tmp_path: Path, spill: bool) -> None:
    torch.manual_seed(0)
    with LayerStates(SHAPES, levels=3, spill=spill, folder=tmp_path) as states:
        assert states.total_bytes == 3 * 25 * 4 * 4 and states.spilled is spill
        put = {(level, n): torch.randn(shape) for level in range(3) for n, shape in enumerate(SHAPES)}
        for place, tensor in put.items():
            states[place] = tensor
        put[1, 1] = put[0, 1] + 1
        states[1, 1] = put[1, 1]
        assert all(torch.equal(states[place], tensor) for place, tensor in put.items())
    assert list(tmp_path.iterdir()) == []


def test_what_is_forgotten_takes_no_memory() -> None:
    with LayerStates(SHAPES, levels=2, spill=False) as states:
        states[0, 0] = states[1, 0] = torch.zeros(SHAPES[0])
        states.forget(1)
        with pytest.raises(KeyError):
            states[1, 0]
        assert states[0, 0].shape == SHAPES[0]


def test_size_decides(tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes:
        def note(self, text: str) -> None:
            notes.append(text)

    def spilled(**budget: int) -> bool:
        progress: Any = Notes()
        return LayerStates(SHAPES, levels=3, folder=tmp_path, progress=progress, **budget).spilled

    assert not spilled() and not spilled(largest_in_memory_bytes=1200) and not notes
    assert spilled(largest_in_memory_bytes=1199) and str(tmp_path) in notes[0]


@pytest.mark.parametrize("kind", ["llama-tied", "t5"])
def test_spilled_scores_are_the_same_bits(tmp_path: Path, tokens: NDArray[np.int64], kind: str) -> None:
    folder = (write_t5 if kind == "t5" else write_tiny)(tmp_path / "model", kind)
    spilled = tmp_path / "spilled"
    spilled.mkdir()
    found = score_units(Checkpoint.open(folder), tokens, micro_batch=4, spill=True, spill_folder=spilled)
    assert_same_bits(found, score_units(Checkpoint.open(folder), tokens, micro_batch=4, spill=False))
    assert list(spilled.iterdir()) == []


def test_an_error_leaves_no_file(tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    folder, spilled = write_tiny(tmp_path / "model", "llama-tied"), tmp_path / "spilled"
    spilled.mkdir()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NirvanaError, match="1 NaN"):
        score_units(Checkpoint.open(folder), tokens, spill=True, spill_folder=spilled)
    assert list(spilled.iterdir()) == []


def test_a_small_disk_is_refused_before_any_work(
    tiny_llama: Path, tokens: NDArray[np.int64], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object) -> None:
        raise AssertionError("read weights")

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 1000))
    monkeypatch.setattr("nirvana_deploy.model.weights.SafetensorsWeights.rows", no_work)
    with pytest.raises(NirvanaError, match=r"Spilling hidden states needs about .*B on the disk of"):
        score_units(Checkpoint.open(tiny_llama), tokens, spill=True, spill_folder=tmp_path)


def test_a_missing_folder_is_a_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(NirvanaError, match="part of the path does not exist"),
        LayerStates(SHAPES, levels=1, spill=True, folder=tmp_path / "missing"),
    ):
        pass


def assert_same_bits(found: UnitScores, expected: UnitScores) -> None:
    pairs = zip(found.groups + found.neurons, expected.groups + expected.neurons, strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
