"""What two runners are compared on: token ids at sizes that no export and no engine was made for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.model.checkpoint import load_tokenizer
from nirvana_deploy.runtime.tensorrt.memory import plan_seq2seq_memory
from nirvana_deploy.runtime.tensorrt.record import EngineRecord, is_part_of_seq2seq

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def is_even(number):",
    "Anna had three apples and bought two more. Now she has",
    "A dictionary is a book that",
)
"""A fact, a quantity, code, arithmetic in a story, a definition: reports show how models continue them, so
that what verification hears serves both."""
MORE_PROMPTS = (
    PROMPTS[0],
    "To make a good cup of coffee, you",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "The three laws of thermodynamics say that",
    PROMPTS[1],
    PROMPTS[3],
    PROMPTS[4],
    "import json\n\ndef read(path):\n",
    "The main causes of the First World War were",
    "Dear Sir or Madam, I am writing to",
    "Q: What is the largest planet of the solar system?\nA:",
    "SELECT name, price FROM products WHERE",
    "Photosynthesis is the process by which",
    "1, 2, 3, 4, 5, 6,",
    "The opposite of hot is",
    "In machine learning, a neural network is",
    "- milk\n- eggs\n- flour\n-",
    "She opened the old wooden door and",
    "To be healthy, one should",
)
"""Twenty, for what answers of many kinds are to be seen of."""
DIFFICULT_TEXTS = (
    " leading space",
    "two  spaces, tab\t",
    "line\n\nbreak",
    "cafe\u0301 \u00e9",
    "1,234.5 \U0001f642",
)
"""Prefix spaces, line ends, an accent that is a character of its own, digits, what takes several bytes."""
NEW_TOKENS = 32
"""Greedy tokens of each prompt that are compared."""
Continued = dict[tuple[int, ...], tuple[int, ...]]
"""Ids of a prompt -> ids of its greedy continuation: NEW_TOKENS, or up to a stop token, which is left out."""
LONGEST_TOKENS = 64
"""Of the comparisons with a checkpoint, prompts and answers included, but the one beyond a window."""
LONGEST_WINDOW_TOKENS = 1024
"""Windows up to this one are looked beyond."""
_LOGITS_LIMIT_BYTES = 2 << 30


@dataclass(frozen=True, eq=False)
class Case:
    """Prompts of N sequences and what follows them, token by token."""

    name: str
    tokens: NDArray[np.int64]
    """[N, T]."""
    mask: NDArray[np.int64]
    """[N, T]: 0 for padding."""
    answer: NDArray[np.int64]
    """[N, A]: tokens after the prompts."""
    at_once: int = 0
    """Tokens of the answer that are read in one pass with the prompts; the others are a decode step each."""
    encoder: bool = False
    """Whether the states of an encoder are compared, not logits."""


def decoder_case(
    shape: tuple[int, int],
    *,
    steps: int = 0,
    padded: NDArray[np.int64] | None = None,
    random: np.random.Generator,
    vocab_size: int,
) -> Case:
    """A prefill of random prompts [N, T], then decode steps; ``padded`` is the mask of the prompts."""
    N, T = shape
    drawn = random.integers(0, vocab_size, size=(N, T + steps))
    name = f"prefill {N} x {T}{'' if padded is None else ', left-padded'}"
    return Case(
        name=f"{name}, then {steps} decode steps" if steps else name,
        tokens=drawn[:, :T],
        mask=np.ones((N, T), dtype=np.int64) if padded is None else padded,
        answer=drawn[:, T:],
    )


def decoder_cases(
    vocab_size: int, *, left_padding: bool = True, window_tokens: int | None = None
) -> Iterator[Case]:
    """For a decoder beside its checkpoint: odd lengths, a left-padded batch, decoding with a past.

    Where layers see the last ``window_tokens`` alone, also a prompt of which they do not see all.
    """
    random = np.random.default_rng(11)
    for shape in ((1, 1), (1, 7), (2, 45)):
        yield decoder_case(shape, random=random, vocab_size=vocab_size)
    yield decoder_case((1, 13), steps=6, random=random, vocab_size=vocab_size)
    if left_padding:
        mask = np.ones((3, 13), dtype=np.int64)
        mask[0, :11], mask[1, :4] = 0, 0
        yield decoder_case((3, 13), steps=6, padded=mask, random=random, vocab_size=vocab_size)
    if window_tokens is not None:
        yield decoder_case((1, window_tokens + 5), steps=3, random=random, vocab_size=vocab_size)


def encoder_decoder_cases(vocab_size: int) -> Iterator[Case]:
    """For an encoder-decoder beside its checkpoint: the encoder alone, answers at once and step by step."""
    random = np.random.default_rng(11)
    both_sides = np.ones((3, 19), dtype=np.int64)
    both_sides[0, :8], both_sides[1, -11:] = 0, 0
    for shape in ((1, 1), (1, 7), (2, 45)):
        tokens = random.integers(0, vocab_size, size=shape)
        name = f"encoder {shape[0]} x {shape[1]}"
        yield Case(name, tokens, np.ones_like(tokens), tokens[:, :0], encoder=True)
    tokens = random.integers(0, vocab_size, size=both_sides.shape)
    yield Case("encoder 3 x 19, padded", tokens, both_sides, tokens[:, :0], encoder=True)
    random = np.random.default_rng(12)
    for mask, first in ((np.ones((1, 5), dtype=np.int64), 61), (both_sides, 1), (both_sides, 13)):
        tokens = random.integers(0, vocab_size, size=mask.shape)
        answer = random.integers(
            0, vocab_size, size=(len(mask), max(first, 19))
        )  # the start token's column too
        padded = "" if mask.all() else ", prompts padded"
        steps = f", then {answer.shape[1] - first} decode steps" if answer.shape[1] > first else ""
        name = f"decoder {len(mask)} x {first} after {mask.shape[1]} tokens{padded}{steps}"
        yield Case(name, tokens, mask, answer[:, 1:], at_once=first - 1)


def runtime_cases(vocab_size: int) -> Iterator[Case]:
    """For one runtime beside another on the same file."""
    for N, T, steps in ((1, 1, 0), (1, 7, 4), (2, 45, 6)):
        yield _seeded(N, T, steps=steps, padded=N > 1, vocab_size=vocab_size)


def engine_cases(record: EngineRecord, *, vocab_size: int) -> Iterator[Case]:
    """The corners of a decoder engine's profiles; largest ones are cut where logits would exceed 2 GB.

    Prompts of an encoder-decoder are its encoder's, whose states the decoder's profiles have the sizes of.
    """
    prompts = "encoder_attention_mask" if is_part_of_seq2seq(record) else "input_ids"
    profiles = {profile.name: profile.shapes[prompts] for profile in record.profiles}
    prefill = profiles.get("prefill", next(iter(profiles.values())))
    total = _total_tokens(record)
    last_only = next(t for t in record.outputs if t.name == "logits").shape[1] == 1
    may_pad = not (last_only and record.kv == "in-place")  # rows end at different places there
    corners = [
        (N, max(1, min(T, _LOGITS_LIMIT_BYTES // (4 * N * vocab_size))), 0, False)
        for N, T in (tuple(shape) for shape in prefill)
    ]
    for shape in profiles.get("decode", prefill):
        corners.append((shape[0], max(1, min(9, total - 6)), min(6, total - 1), may_pad and shape[0] > 1))
    longest = min(total - 2, prefill[2][1], _LOGITS_LIMIT_BYTES // (4 * vocab_size))
    if longest > 0:
        corners.append((1, longest, 2, False))
    for N, T, steps, padded in dict.fromkeys(corners):
        yield _seeded(N, T, steps=steps, padded=padded, vocab_size=vocab_size)


def _seeded(N: int, T: int, *, steps: int, padded: bool, vocab_size: int) -> Case:
    """Every second prompt is shorter where it is ``padded``."""
    mask = np.ones((N, T), dtype=np.int64)
    mask[1::2, : T // 2] = 0
    return decoder_case(
        (N, T),
        steps=steps,
        padded=mask if padded else None,
        random=np.random.default_rng((N, T)),
        vocab_size=vocab_size,
    )


def prompts_for(checkpoint: Path, vocab_size: int, texts: Sequence[str] = PROMPTS) -> list[NDArray[np.int64]]:
    """Token ids [1, T] of the prompts; random ids where the folder has no tokenizer."""
    if not (checkpoint / "tokenizer_config.json").is_file():
        return random_prompts(vocab_size)
    tokenizer = load_tokenizer(checkpoint)
    return [np.array([tokenizer(prompt)["input_ids"]], dtype=np.int64) for prompt in texts]


def random_prompts(vocab_size: int) -> list[NDArray[np.int64]]:
    """As many prompts [1, 6] of random ids."""
    random = np.random.default_rng(5)
    return [random.integers(0, vocab_size, size=(1, 6)) for _ in PROMPTS]


def answers_of(
    record: EngineRecord, prompts: Sequence[NDArray[np.int64]], *, at_most: int = 32
) -> tuple[list[NDArray[np.int64]], int]:
    """Prompts and a number of new tokens that an engine has room for: both halved where it is short."""
    total = _total_tokens(record)
    fitting = [prompt[:, : max(1, total // 2)] for prompt in prompts]
    return fitting, min(at_most, total - max(prompt.shape[1] for prompt in fitting))


def _total_tokens(record: EngineRecord) -> int:
    """Longest sequence that the engine takes; of an encoder-decoder, the longest answer."""
    if is_part_of_seq2seq(record):
        return plan_seq2seq_memory(record).limits.total_tokens
    lengths = (
        profile.shapes["attention_mask"][2][1]
        for profile in record.profiles
        if "attention_mask" in profile.shapes
    )
    slots = (t.shape[2] for t in record.inputs if t.name.startswith("past_key_values."))
    return max(lengths, default=0) or next(slots) or 1
