"""Workloads as files: the embedded ones, what they draw, and each way to say something impossible."""

from __future__ import annotations

from pathlib import Path

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.measure.workloads.named import (
    NamedWorkload,
    Request,
    WorkloadFile,
    embedded_names,
    load_workloads,
    require_within_context,
)


def test_the_embedded_workloads_are_whole() -> None:
    assert embedded_names() == ("batch", "chat", "edge", "rag", "server")
    for workload in load_workloads(embedded_names()):
        file = workload.file
        assert file.about and 1 <= file.batch_size <= 32
        requests = workload.timed()
        assert sum(one.batch_size for one in requests) == file.requests
        assert max(one.sequence_tokens for one in requests) <= workload.longest().sequence_tokens


def test_lengths_are_drawn_by_the_seed() -> None:
    def drawn(seed: int) -> list[tuple[int, int]]:
        file = WorkloadFile(
            prompt_tokens={"least": 3, "most": 5}, new_tokens=(2, 9), requests=60, batch_size=2, seed=seed
        )  # fmt: skip
        return [(one.prompt_tokens, one.new_tokens) for one in NamedWorkload("n", file).timed()]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(drawn(0)) == 30 and {prompt for prompt, _ in drawn(0)} == {3, 4, 5}
    assert {new for _, new in drawn(0)} == {2, 9}


def test_requests_at_a_server_come_in_rounds_of_the_same_requests() -> None:
    def rounds(requests: int, concurrency: int) -> list[int]:
        file = WorkloadFile(prompt_tokens=(3, 5), new_tokens=4, requests=requests, concurrency=concurrency)
        workload = NamedWorkload("n", file)
        found = workload.rounds()
        assert sum((one.requests for one in found), ()) == workload.timed()
        assert [one.index for one in found] == list(range(len(found)))
        asked = {request.index for request in workload.timed()}
        first = workload.warmup_round().requests
        assert [one.prompt_tokens for one in first] == [5] * concurrency
        assert asked.isdisjoint({one.index for one in first}) and {one.batch_size for one in first} == {1}
        assert workload.longest().written_tokens == concurrency * 8
        return [len(one.requests) for one in found]

    assert rounds(96, 4) == [16] * 6
    assert rounds(27, 4) == [4, 5, 4, 5, 4, 5]
    assert rounds(9, 4) == [4, 5]
    assert rounds(4, 4) == [4]


def test_a_workload_without_clients_says_nothing_of_them() -> None:
    (chat, server) = load_workloads(["chat", "server"])
    assert "concurrency" not in chat.to_json() and server.to_json()["concurrency"] == 4


def test_several_names_and_files(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("prompt_tokens = 4\nnew_tokens = [2, 3]\nrequests = 1\n")
    names = [one.name for one in load_workloads(["chat, edge", str(mine)])]
    assert names == ["chat", "edge", "mine"]
    with pytest.raises(NirvanaError, match="Two workloads are called 'mine'"):
        load_workloads([str(mine), str(mine)])
    with pytest.raises(NirvanaError, match=r"Unknown workload 'chatt'\. Did you mean 'chat'.*\n.*\.toml"):
        load_workloads(["chatt"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"promt_tokens": "4"}, r"unknown key 'promt_tokens'\. Did you mean 'prompt_tokens'"),
        ({"requests": "0"}, "requests = 0 is not allowed; .* at least 1"),
        ({"requests": "6", "batch_size": "4"}, "requests = 6 is no multiple of batch_size = 4; 4 or 8"),
        ({"requests": "1", "batch_size": "4"}, "requests = 1 is no multiple of batch_size = 4; 4 would"),
        ({"requests": None}, "'requests' is missing"),
        ({"batch_size": "0"}, "batch_size = 0 is not allowed"),
        ({"new_tokens": "1"}, "new_tokens = 1 is not allowed; it takes at least 2"),
        ({"prompt_tokens": "[4, 0]"}, "prompt_tokens = 0 is not allowed; it takes at least 1"),
        ({"prompt_tokens": "[]"}, "prompt_tokens is an empty list; it takes a whole number, a list"),
        ({"prompt_tokens": "'4'"}, "prompt_tokens = '4' is not allowed; it takes a whole number, a list"),
        ({"prompt_tokens": "true"}, "prompt_tokens = True is not allowed"),
        ({"prompt_tokens": "{ least = 4, mst = 5 }"}, "it takes a whole number, a list of them, or { least"),
        ({"prompt_tokens": "{ least = 9, most = 4 }"}, "least = 9 and most = 4, which is less"),
        ({"seed": "-1"}, "seed = -1 is not allowed"),
        ({"concurrency": "0"}, "concurrency = 0 is not allowed; .* at least 1"),
        (
            {"concurrency": "2", "batch_size": "2"},
            "with concurrency = 2 every request stands alone, .*batch_size = 2 is not allowed",
        ),
        ({"concurrency": "8"}, "requests = 4 is less than concurrency = 8"),
    ],
)
def test_what_is_impossible_is_refused(tmp_path: Path, changes: dict[str, str | None], said: str) -> None:
    keys = {"prompt_tokens": "4", "new_tokens": "4", "requests": "4", **changes}
    file = tmp_path / "mine.toml"
    file.write_text("".join(f"{key} = {value}\n" for key, value in keys.items() if value is not None))
    with pytest.raises(NirvanaError, match=rf"mine\.toml: .*{said}"):
        load_workloads([str(file)])


def test_the_context_is_the_limit() -> None:
    longest = Request(batch_size=8, prompt_tokens=120, new_tokens=8, seed=0, index=0)
    for context_tokens in (None, 128):
        require_within_context("rag", longest, context_tokens=context_tokens, hint="less")
    said = r"rag: prompt_tokens = 120 and new_tokens = 8 make 128 tokens, .* context is 127\.\nless"
    with pytest.raises(NirvanaError, match=said):
        require_within_context("rag", longest, context_tokens=127, hint="less")
