"""Many pieces of work: a failure of one is no failure of the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from builders.pieces import dying, halved

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import default_threads, usable_threads
from nirvana_deploy.search.recipe import Where
from nirvana_deploy.search.workers import run_points


@pytest.mark.parametrize("processes", [1, 2])
def test_every_piece_has_its_result_or_why_it_has_none(processes: int) -> None:
    found = dict(run_points([2, 3, 4], halved, Where(processes=processes)))
    assert found[2] == 1 and found[4] == 2
    refused = found[3]
    assert isinstance(refused, NirvanaError)
    assert (refused.message, refused.hint) == ("3 is odd.", "Try an even one.")


def test_a_fault_of_ours_is_no_result() -> None:
    with pytest.raises(ZeroDivisionError):
        dict(run_points([2, 13], halved, Where()))


def threads(_: int) -> tuple[int, int]:
    """Those of torch and of ONNX Runtime."""
    return torch.get_num_threads(), default_threads()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_threads(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    each = max(1, usable_threads() // processes)
    found = dict(run_points(range(processes), threads, Where(processes=processes)))
    assert set(found.values()) == {(each, each)}
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_a_piece_whose_process_is_lost_is_done_again_and_takes_no_other_with_it(tmp_path: Path) -> None:
    pieces = [(tmp_path, number) for number in (1, 2, 3, 4)]
    found = {number: result for (_, number), result in run_points(pieces, dying, Where(processes=2))}
    refused = found.pop(3)
    assert found == {1: 1, 2: 2, 4: 4}
    assert isinstance(refused, NirvanaError) and refused.message.startswith("Its worker was lost 4 times: ")
    tries = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert tries == {"1": 1, "2": 2, "3": 4, "4": 1}
