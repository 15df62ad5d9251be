"""Axes as they are typed."""

from __future__ import annotations

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.workloads.sweep import sweeps_of

BASE = Workload(prompt_tokens=8, new_tokens=4, batch_size=2, threads=1)


def test_one_option_varies_and_the_others_stay() -> None:
    context, batch, threads = sweeps_of(["context=64,16", "batch=1, 4,4", "threads=1,2"], BASE)
    assert context.values == (16, 64) and batch.values == (1, 4)
    one = context.request(64, 3)
    assert (one.batch_size, one.prompt_tokens, one.new_tokens, one.index) == (2, 64, 4, 3)
    assert batch.request(4, 0).prompt_tokens == 8 and batch.request(4, 0).batch_size == 4
    assert threads.at(2).threads == 2 and threads.request(2, 0) == threads.request(1, 0)
    assert (
        batch.longest().batch_size == 4
        and context.longest().sequence_tokens == 68
        and context.within(67) == (16,)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("contxt=1,2", "Unknown axis of --sweep 'contxt'. Did you mean 'context'"),
        ("batch", "takes whole numbers separated by commas, got nothing"),
        ("batch=1,two", "takes whole numbers separated by commas, got '1,two'"),
        ("batch=2", "has one value, and a curve needs two"),
        ("batch=0,1", "batch_size = 0 is not allowed"),
        ("threads=-1,1", "threads = -1 is not allowed"),
    ],
)
def test_what_is_no_axis_is_refused(text: str, said: str) -> None:
    with pytest.raises(NirvanaError, match=said):
        sweeps_of([text], BASE)


def test_an_axis_has_one_sweep() -> None:
    with pytest.raises(NirvanaError, match="Two sweeps go over 'batch'"):
        sweeps_of(["batch=1,2", "batch=4,8"], BASE)
