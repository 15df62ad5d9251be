"""Many pieces of work: a failure of one is no failure of the others."""

from __future__ import annotations

import os

import pytest
import torch

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import default_threads, usable_threads
from nirvana_deploy.search.recipe import Where
from nirvana_deploy.search.workers import run_points


def halved(number: int) -> int:
    """Work that refuses odd numbers, and does not know 13."""
    if number == 13:
        raise ZeroDivisionError
    if number % 2:
        raise NirvanaError(f"{number} is odd.", hint="Try an even one.")
    return number // 2


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
