"""Two runners agree: the same logits within a tolerance, the same greedy tokens but at ties.

An exported graph is compared with its checkpoint in torch, an engine or another provider with ONNX Runtime
on the file that it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.runtime.runner import ReadsPrompts, Runner, greedy_tokens
from nirvana_deploy.verify.cases import DIFFICULT_TEXTS, PROMPTS, Case
from nirvana_deploy.verify.report import GreedyCheck, LogitsCheck, TextCheck, VerifyReport
from nirvana_deploy.verify.tolerance import compare_outputs, judge_exactly

Generate = Callable[[NDArray[np.int64]], list[int]]
"""A prompt [1, T] to new ids, up to a stop token, which is left out."""


@runtime_checkable
class Exact(Protocol):
    """A reference that can compute in float64."""

    def in_float64(self) -> AbstractContextManager[None]:
        """Compute in float64 inside the block."""
        ...


def compare_runners(
    reference: Runner,
    runner: Runner,
    *,
    cases: Iterable[Case],
    tolerance: float,
    prompts: Sequence[NDArray[np.int64]],
    new_tokens: int = 32,
    stops: frozenset[int] = frozenset(),
    progress: Progress = SILENT,
) -> VerifyReport:
    """Compare logits in every case, and greedy continuations of the ``prompts`` [1, T].

    ``tolerance`` is a share of the reference's largest logit. A difference is a result, not an exception.
    Raises NirvanaError for vocabularies that differ.
    """
    require_one_vocabulary(reference, runner)
    cases = list(cases)
    with progress.task(f"Verifying {runner.runtime}", len(cases) + 1) as advance:
        checks = []
        for case in cases:
            checks.append(logits_check(case, reference, runner, tolerance))
            advance(1)
        found = list(map(generator(runner, new_tokens, stops), prompts))
        wanted = Continuations.by(reference, prompts, new_tokens=new_tokens, stops=stops, guesses=found)
        greedy = wanted.compare(runner.runtime, found, tolerance)
        advance(1)
    return VerifyReport(checks=tuple(checks), greedy=(greedy,), first_departure=None)


def compare_texts(runtime: str, tokenizer: Any, encode: Callable[[str], list[int]]) -> TextCheck:
    """Compare the ids of PROMPTS and of texts that tokenizers like to differ on."""
    texts = (*PROMPTS, *DIFFICULT_TEXTS)
    pairs = [(text, list(tokenizer(text)["input_ids"]), encode(text)) for text in texts]
    other = next(((text, ours, theirs) for text, ours, theirs in pairs if ours != theirs), None)
    return TextCheck(
        runtime,
        texts=len(pairs),
        equal_texts=sum(ours == theirs for _, ours, theirs in pairs),
        differs=other and f"{other[0]!r} is {other[1][:12]} to transformers and {other[2][:12]} to {runtime}",
    )


def require_one_vocabulary(reference: Runner, runner: Runner) -> None:
    """Raise NirvanaError for vocabularies that differ."""
    if reference.vocab_size != runner.vocab_size:
        raise NirvanaError(
            f"{runner.runtime} has a vocabulary of {runner.vocab_size}, "
            f"{reference.runtime} of {reference.vocab_size}: these are two models."
        )


def logits_check(
    case: Case, reference: Runner, runner: Runner, tolerance: float, *, narrowly: float | None = None
) -> LogitsCheck:
    """Compare one case; positions at which either gives no logits are left out.

    A difference of at most ``narrowly`` times what is allowed is judged once more, in float64.
    """
    found, expected = _outputs(case, runner), _expected(case, reference)
    if found.shape[1] > expected.shape[1]:  # the reference gives the last logits of a pass alone
        expected = _outputs(case, reference)
    count = found.shape[1]
    mask = case.mask
    if not case.encoder:  # the last position of a prompt, or the start token, is never padding
        mask = np.concatenate(
            [mask[:, :-1], np.ones((len(mask), 1 + case.answer.shape[1]), np.int64)], axis=1
        )
    mask, expected = mask[:, -count:], expected[:, -count:]
    check = compare_outputs(case.name, found, expected, mask, tolerance)
    if check.passed or narrowly is None or not check.max_abs_diff <= narrowly * check.tolerance:
        return check
    assert isinstance(reference, Exact)
    with reference.in_float64():
        exact = _expected(case, reference)[:, -count:]
    return judge_exactly(case.name, found, expected, exact, mask, tolerance)


def _expected(case: Case, reference: Runner) -> NDArray[np.float32]:
    """Everything in one pass, at all positions [N, R, V]."""
    if case.encoder:
        return _encoder_states(case, reference)
    return reference.prefill(case.tokens, case.mask, case.answer)[0]


def _outputs(case: Case, runner: Runner) -> NDArray[np.float32]:
    """The same with a past: the prompts with what is read at once, then token by token."""
    if case.encoder:
        return _encoder_states(case, runner)
    logits, state = runner.prefill(case.tokens, case.mask, case.answer[:, : case.at_once])
    parts = [logits]
    for position in range(case.at_once, case.answer.shape[1]):
        logits, state = runner.decode(case.answer[:, position : position + 1], state)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def _encoder_states(case: Case, runner: Runner) -> NDArray[np.float32]:
    assert isinstance(runner, ReadsPrompts)
    return runner.encoder_states(case.tokens, case.mask)


def generator(runner: Runner, new_tokens: int, stops: frozenset[int]) -> Generate:
    """Greedy continuations by a runner."""

    def generate(prompt: NDArray[np.int64]) -> list[int]:
        new_ids = greedy_tokens(runner, prompt, max_new_tokens=new_tokens, eos_token_ids=stops)
        return new_ids[:-1] if new_ids and new_ids[-1] in stops else new_ids

    return generate


@dataclass(frozen=True)
class Continuations:
    """Greedy continuations of prompts by a runner that is trusted."""

    reference: Runner
    prompts: Sequence[NDArray[np.int64]]
    ids: Sequence[Sequence[int]]
    new_tokens: int

    @classmethod
    def by(
        cls,
        reference: Runner,
        prompts: Sequence[NDArray[np.int64]],
        *,
        new_tokens: int,
        stops: frozenset[int],
        guesses: Sequence[Sequence[int]],
    ) -> Continuations:
        """Continue every prompt [1, T] with ``reference``.

        Of a good guess, ids that another runner chose, one pass shows that they are its own.
        """
        generate = generator(reference, new_tokens, stops)
        ids = []
        for prompt, guess in zip(prompts, map(list, guesses), strict=True):
            own = _choices(reference, prompt, guess[: new_tokens - 1])
            ends = len(guess) == new_tokens or (len(own) > len(guess) and own[-1] in stops)
            good = ends and own[: len(guess)] == guess and stops.isdisjoint(guess)
            ids.append(guess if good else generate(prompt))
        return cls(reference=reference, prompts=prompts, ids=ids, new_tokens=new_tokens)

    def compare(self, runtime: str, found: Iterable[Sequence[int]], tolerance: float) -> GreedyCheck:
        """Compare with another runtime's, token by token; parting at a tie counts as equal."""
        equal = ties = 0
        for prompt, wanted, others in zip(self.prompts, self.ids, found, strict=True):
            same = [*others] == [*wanted]
            equal += same
            ties += not same and parted_at_a_tie(self.reference, prompt, wanted, others, tolerance)
        return GreedyCheck(
            runtime=runtime,
            prompts=len(self.prompts),
            new_tokens=self.new_tokens,
            equal_prompts=equal,
            ties=ties,
            passed=equal + ties == len(self.prompts),
        )


def _choices(reference: Runner, prompt: NDArray[np.int64], behind: Sequence[int]) -> list[int]:
    """The likeliest id after a prompt [1, T], after the first id ``behind`` it, and so on; nothing where a
    graph gives the last logits alone.

    One pass reads the weights once, where continuing reads them for each token.
    """
    answer = np.array([behind], dtype=np.int64).reshape(1, len(behind))
    logits = reference.prefill(prompt, answer=answer)[0][0]
    if len(logits) <= len(behind):
        return []
    chosen: list[int] = logits[-(len(behind) + 1) :].argmax(axis=-1).tolist()
    return chosen


def parted_at_a_tie(
    reference: Runner,
    prompt: NDArray[np.int64],
    wanted: Sequence[int],
    found: Sequence[int],
    tolerance: float,
) -> bool:
    """Whether two continuations part where the reference itself sees both tokens as equally likely.

    Their logits may differ by ``tolerance`` of the largest one. No tie explains why one is shorter.
    """
    pairs = enumerate(zip(wanted, found, strict=False))
    at = next((index for index, (a, b) in pairs if a != b), None)
    if at is None:
        return False
    logits, _ = reference.prefill(prompt, answer=np.array([wanted[:at]], dtype=np.int64).reshape(1, at))
    last = logits[0, -1]
    return bool(abs(last[wanted[at]] - last[found[at]]) <= tolerance * np.abs(last).max())
