"""Answers written together are those that each would have been alone, and a slot is never lost."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from builders.tiny_decoder import VOCAB, write_tiny_decoder

from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.runner import greedy_tokens
from nirvana_deploy.serve.batch import Asked, Batch, ClosedError, FullError
from nirvana_deploy.serve.sampling import Sampling

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrtDecoder]:
    with OrtDecoder(write_tiny_decoder(tmp_path_factory.mktemp("tiny")), threads=1) as opened:
        yield opened


class Watched:
    """A runner whose steps wait until they are let go, and fail when told."""

    def __init__(self, runner: OrtDecoder) -> None:
        self._runner = runner
        self.gate = threading.Event()
        self.gate.set()
        self.rows: list[int] = []
        self.failing = False
        self.vocab_size = runner.vocab_size

    def prefill(self, tokens: Any) -> Any:
        return self._runner.prefill(tokens)

    def decode(self, tokens: Any, state: Any) -> Any:
        self.gate.wait()
        self.rows.append(len(tokens))
        if self.failing:
            raise RuntimeError("out of memory")
        return self._runner.decode(tokens, state)

    def joined(self, state: Any, more: Any) -> Any:
        return self._runner.joined(state, more)

    def kept(self, state: Any, rows: Any) -> Any:
        return self._runner.kept(state, rows)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, size=rng.integers(1, 20)).tolist() for _ in range(count)]


def asked(prompt: list[int], new_tokens: int = NEW_TOKENS, stops: frozenset[int] = frozenset()) -> Asked:
    return Asked(prompt=prompt, max_new_tokens=new_tokens, stops=stops, sampling=Sampling())


def collected(events: queue.Queue[Any]) -> tuple[list[int], Any]:
    tokens = []
    while isinstance(event := events.get(timeout=60), int):
        tokens.append(event)
    return tokens, event


def test_thirty_two_answers_on_four_slots_are_those_of_single_runs(runner: OrtDecoder) -> None:
    watched = Watched(runner)
    batch = Batch(watched, slots=4, queue=32)  # type: ignore[arg-type]
    work = []
    for place, prompt in enumerate(prompts(32)):
        length, events = 1 + place % NEW_TOKENS, queue.Queue[Any]()
        batch.submit(asked(prompt, length), events.put)
        work.append((prompt, length, events))
    for prompt, length, events in work:
        alone = greedy_tokens(runner, np.array([prompt]), max_new_tokens=length)
        assert collected(events) == (alone, "length")
    batch.close()
    assert max(watched.rows) == 4 and (batch.active, batch.waiting) == (0, 0)


def test_a_stop_token_ends_an_answer(runner: OrtDecoder) -> None:
    prompt = prompts(1)[0]
    alone = greedy_tokens(runner, np.array([prompt]), max_new_tokens=NEW_TOKENS)
    batch, events = Batch(runner, slots=2, queue=0), queue.Queue[Any]()
    batch.submit(asked(prompt, stops=frozenset({alone[3]})), events.put)
    assert collected(events) == (alone[: alone.index(alone[3]) + 1], "stop")
    batch.close()


def test_a_cancelled_answer_frees_its_slot_and_its_place_in_the_queue(runner: OrtDecoder) -> None:
    watched = Watched(runner)
    watched.gate.clear()
    batch = Batch(watched, slots=1, queue=1)  # type: ignore[arg-type]
    first, second, third = queue.Queue[Any](), queue.Queue[Any](), queue.Queue[Any]()
    one, two, three = prompts(3)
    at_work = batch.submit(asked(one, 40), first.put)
    assert first.get(timeout=60) >= 0  # it has its slot
    waiting = batch.submit(asked(two), second.put)
    with pytest.raises(FullError):
        batch.submit(asked(three), third.put)
    batch.cancel(waiting)
    assert batch.waiting == 0
    batch.submit(asked(three), third.put)
    batch.cancel(at_work)
    watched.gate.set()
    alone = greedy_tokens(runner, np.array([three]), max_new_tokens=NEW_TOKENS)
    assert collected(third) == (alone, "length")
    batch.close()
    assert second.empty()


def test_a_failing_runtime_fails_the_answers_at_work_and_no_later_one(runner: OrtDecoder) -> None:
    watched = Watched(runner)
    watched.failing = True
    batch = Batch(watched, slots=2, queue=4)  # type: ignore[arg-type]
    one, two = prompts(2)
    failed, fine = queue.Queue[Any](), queue.Queue[Any]()
    batch.submit(asked(one), failed.put)
    assert isinstance(collected(failed)[1], RuntimeError)
    watched.failing = False
    batch.submit(asked(two), fine.put)
    assert collected(fine)[1] == "length"
    batch.close()


def test_an_answer_whose_token_cannot_be_drawn_fails_alone(runner: OrtDecoder) -> None:
    class WithoutNumbers(Watched):
        def decode(self, tokens: Any, state: Any) -> Any:
            logits, state = super().decode(tokens, state)
            logits = logits.copy()
            logits[1:] = np.nan
            return logits, state

    watched = WithoutNumbers(runner)
    watched.gate.clear()
    batch = Batch(watched, slots=2, queue=4)  # type: ignore[arg-type]
    fine, failed = queue.Queue[Any](), queue.Queue[Any]()
    one, two = prompts(2)
    batch.submit(asked(one), fine.put)
    drawn = Asked(prompt=two, max_new_tokens=4, stops=frozenset(), sampling=Sampling(temperature=1.0))
    batch.submit(drawn, failed.put)
    watched.gate.set()
    assert isinstance(collected(failed)[1], ValueError)
    alone = greedy_tokens(runner, np.array([one]), max_new_tokens=NEW_TOKENS)
    assert collected(fine) == (alone, "length")
    batch.close()


def test_a_prompt_that_cannot_be_read_fails_alone(runner: OrtDecoder) -> None:
    watched = Watched(runner)
    watched.gate.clear()
    batch = Batch(watched, slots=2, queue=4)  # type: ignore[arg-type]
    fine, failed = queue.Queue[Any](), queue.Queue[Any]()
    prompt = prompts(1)[0]
    batch.submit(asked(prompt), fine.put)
    batch.submit(asked([VOCAB + 5]), failed.put)
    watched.gate.set()
    assert isinstance(collected(failed)[1], Exception)
    alone = greedy_tokens(runner, np.array([prompt]), max_new_tokens=NEW_TOKENS)
    assert collected(fine) == (alone, "length")
    batch.close()


def test_a_closed_batch_says_so_to_those_who_wait(runner: OrtDecoder) -> None:
    watched = Watched(runner)
    watched.gate.clear()
    batch = Batch(watched, slots=1, queue=4)  # type: ignore[arg-type]
    first, second = queue.Queue[Any](), queue.Queue[Any]()
    one, two = prompts(2)
    batch.submit(asked(one, 40), first.put)
    batch.submit(asked(two), second.put)
    first.get(timeout=60)
    threading.Timer(0.2, watched.gate.set).start()
    batch.close()
    assert isinstance(collected(first)[1], ClosedError) and isinstance(collected(second)[1], ClosedError)
    with pytest.raises(ClosedError):
        batch.submit(asked(one), first.put)


def test_a_runner_that_joins_no_states_writes_one_answer_at_a_time(runner: OrtDecoder) -> None:
    class Single:
        vocab_size = runner.vocab_size

        def prefill(self, tokens: Any) -> Any:
            return runner.prefill(tokens)

        def decode(self, tokens: Any, state: Any) -> Any:
            assert len(tokens) == 1
            return runner.decode(tokens, state)

    batch = Batch(Single(), slots=4, queue=8)  # type: ignore[arg-type]
    assert batch.slots == 1
    events = [queue.Queue[Any]() for _ in range(5)]
    for prompt, heard in zip(prompts(5), events, strict=True):
        batch.submit(asked(prompt), heard.put)
    for prompt, heard in zip(prompts(5), events, strict=True):
        assert collected(heard)[0] == greedy_tokens(runner, np.array([prompt]), max_new_tokens=NEW_TOKENS)
    batch.close()
