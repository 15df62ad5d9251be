"""Prove one runner against another that is trusted: the same logits, the same greedy tokens.

An engine is compared with ONNX Runtime on the file that it was built from, at the corners of its profiles:
what a profile promises is tried at its smallest, its optimal and its largest sizes. A provider of ONNX
Runtime is compared with the CPU's in the same way, at sizes that no export knew of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.export.dtypes import DTYPES
from nirvana_deploy.runtime.registry import Runner
from nirvana_deploy.runtime.tensorrt.memory import plan_seq2seq_memory
from nirvana_deploy.runtime.tensorrt.record import EngineRecord, is_part_of_seq2seq
from nirvana_deploy.verify.against_torch import GreedyCheck, VerifyReport
from nirvana_deploy.verify.tolerance import LogitsCheck, relative_tolerance

_LOGITS_LIMIT_BYTES = 2 << 30


@dataclass(frozen=True)
class Case:
    """One pass over N prompts of T tokens, then decode steps."""

    batch_size: int
    prompt_tokens: int
    steps: int = 0
    padded: bool = False
    """Every second prompt is shorter, padded on the left."""

    def __str__(self) -> str:
        padded = ", left-padded" if self.padded else ""
        steps = f", then {self.steps} decode steps" if self.steps else ""
        return f"prefill {self.batch_size} x {self.prompt_tokens}{padded}{steps}"


DEFAULT_CASES = (Case(1, 1), Case(1, 7, steps=4), Case(2, 45, steps=6, padded=True))


def cases_of(record: EngineRecord, *, vocab_size: int) -> tuple[Case, ...]:
    """The corners of a decoder engine's profiles; largest ones are cut where logits would exceed 2 GB.

    Prompts of an encoder-decoder are its encoder's, whose states the decoder's profiles have the sizes of.
    """
    prompts = "encoder_attention_mask" if is_part_of_seq2seq(record) else "input_ids"
    profiles = {profile.name: profile.shapes[prompts] for profile in record.profiles}
    prefill = profiles.get("prefill", next(iter(profiles.values())))
    total = _total_tokens(record)
    last_only = next(t for t in record.outputs if t.name == "logits").shape[1] == 1
    may_pad = not (last_only and record.kv == "in-place")  # rows end at different places there
    cases = []
    for N, T in dict.fromkeys(tuple(shape) for shape in prefill):
        cases.append(Case(N, max(1, min(T, _LOGITS_LIMIT_BYTES // (4 * N * vocab_size)))))
    decode = profiles.get("decode", prefill)
    for N in dict.fromkeys(shape[0] for shape in decode):
        cases.append(Case(N, max(1, min(9, total - 6)), steps=min(6, total - 1), padded=may_pad and N > 1))
    longest = min(total - 2, prefill[2][1], _LOGITS_LIMIT_BYTES // (4 * vocab_size))
    if longest > 0:
        cases.append(Case(1, longest, steps=2))
    return tuple(dict.fromkeys(cases))


def answers_of(
    record: EngineRecord, prompts: Sequence[NDArray[np.int64]], *, at_most: int = 32
) -> tuple[list[NDArray[np.int64]], int]:
    """Prompts and a number of new tokens that an engine has room for: both halved where it is short."""
    total = _total_tokens(record)
    fitting = [prompt[:, : max(1, total // 2)] for prompt in prompts]
    return fitting, min(at_most, total - max(prompt.shape[1] for prompt in fitting))


def compare_runners(
    reference: Runner,
    runner: Runner,
    *,
    cases: Sequence[Case] = DEFAULT_CASES,
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
    if reference.vocab_size != runner.vocab_size:
        raise NirvanaError(
            f"{runner.runtime} has a vocabulary of {runner.vocab_size}, "
            f"{reference.runtime} of {reference.vocab_size}: these are two models."
        )
    with progress.task(f"Verifying {runner.runtime}", len(cases) + 1) as advance:
        checks = []
        for case in cases:
            checks.append(_compared(case, reference, runner, tolerance))
            advance(1)
        greedy = _greedy(reference, runner, prompts, new_tokens, stops, tolerance)
        advance(1)
    return VerifyReport(checks=tuple(checks), greedy=(greedy,), first_departure=None)


def device_tolerance(dtype: str, *, layers: int, quantization: str | None = None) -> float:
    """Largest difference of logits that a GPU's arithmetic explains, as a share of the largest logit.

    As :func:`relative_tolerance`, with two differences: float32 products run in TF32 there, whose unit
    roundoff is that of float16; and where activations are quantized to 8 bits, a rounding that falls to the
    other side moves a value by a step of 2^-8, as bfloat16 does. Not yet measured on a GPU.
    """
    coarse = dtype == "bf16" or quantization == "int8"
    return relative_tolerance(DTYPES["bf16" if coarse else "fp16"], layers=layers)


def random_prompts(vocab_size: int, *, count: int = 5, tokens: int = 6) -> list[NDArray[np.int64]]:
    """Prompts [1, T] of random ids, for a model without a tokenizer."""
    generator = np.random.default_rng(5)
    return [generator.integers(0, vocab_size, size=(1, tokens)) for _ in range(count)]


def _compared(case: Case, reference: Runner, runner: Runner, tolerance: float) -> LogitsCheck:
    """Both run the case on the same random tokens."""
    generator = np.random.default_rng((case.batch_size, case.prompt_tokens))
    length = case.prompt_tokens + case.steps
    tokens = generator.integers(0, reference.vocab_size, size=(case.batch_size, length))
    mask = np.ones_like(tokens)
    if case.padded:
        mask[1::2, : case.prompt_tokens // 2] = 0
    expected = _logits(reference, tokens, mask, case)
    found = _logits(runner, tokens, mask, case)
    if found.shape[1] < expected.shape[1]:  # the graph keeps the logits of the last position alone
        expected = expected[:, -found.shape[1] :]
    real = mask[:, -found.shape[1] :].astype(bool)
    difference = float(np.abs(found - expected)[real].max())
    allowed = tolerance * float(np.abs(expected[real]).max())
    return LogitsCheck(str(case), difference, allowed, passed=bool(difference <= allowed))


def _logits(
    runner: Runner, tokens: NDArray[np.int64], mask: NDArray[np.int64], case: Case
) -> NDArray[np.float32]:
    """Logits at every position that the runner gives: of the prompt and of each step."""
    logits, state = runner.prefill(tokens[:, : case.prompt_tokens], mask[:, : case.prompt_tokens])
    parts = [logits]
    for position in range(case.prompt_tokens, tokens.shape[1]):
        logits, state = runner.decode(tokens[:, position : position + 1], state)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def _greedy(
    reference: Runner,
    runner: Runner,
    prompts: Sequence[NDArray[np.int64]],
    new_tokens: int,
    stops: frozenset[int],
    tolerance: float,
) -> GreedyCheck:
    """Continuations token by token; parting where the reference sees two tokens as equal is a tie."""
    equal = ties = 0
    for prompt in prompts:
        wanted, found = (
            one.generate(prompt, max_new_tokens=new_tokens, eos_token_ids=stops)
            for one in (reference, runner)
        )
        equal += wanted == found
        ties += wanted != found and _tied(reference, prompt, wanted, found, tolerance)
    return GreedyCheck(
        runtime=runner.runtime,
        prompts=len(prompts),
        new_tokens=new_tokens,
        equal_prompts=equal,
        ties=ties,
        passed=equal + ties == len(prompts),
    )


def _tied(
    reference: Runner,
    prompt: NDArray[np.int64],
    wanted: Sequence[int],
    found: Sequence[int],
    tolerance: float,
) -> bool:
    at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), None)
    if at is None:
        return False  # one is shorter: no tie explains that
    logits, state = reference.prefill(prompt)
    for token in wanted[:at]:
        logits, state = reference.decode(np.array([[token]], dtype=np.int64), state)
    last = logits[0, -1]
    return bool(abs(last[wanted[at]] - last[found[at]]) <= tolerance * np.abs(last).max())


def _total_tokens(record: EngineRecord) -> int:
    """Longest sequence that the engine takes; of an encoder-decoder, the longest answer."""
    if is_part_of_seq2seq(record):
        return plan_seq2seq_memory(record).limits.total_tokens
    lengths: Iterator[int] = (
        profile.shapes["attention_mask"][2][1]
        for profile in record.profiles
        if "attention_mask" in profile.shapes
    )
    slots = (t.shape[2] for t in record.inputs if t.name.startswith("past_key_values."))
    return max(lengths, default=0) or next(slots) or 1
