"""Optimization profiles: the sizes that an engine takes and is tuned for.

A decoder has two: ``prefill`` reads T tokens without a past, ``decode`` adds one token to a past. With a
cache updated in place they differ in T alone. A profile gives a range to each *name* of a varying
dimension; shapes follow from the graph, dependent sizes (``total_sequence_length``) from the others.

Letters: B sequences of a batch, T new tokens, S past and new tokens, C slots of a fixed cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.units import format_bytes
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.source import OnnxSource
from nirvana_deploy.runtime.tensorrt.record import ProfileRecord

BATCH = "batch_size"
_DEFAULT_LENGTH_TOKENS = 2048
_DEFAULT_PROMPT_TOKENS = 128
_DEFAULT_PAST_TOKENS = 512


@dataclass(frozen=True)
class Range:
    """The sizes of one dimension: the smallest, the one that the builder tunes for, the largest."""

    minimum: int
    optimum: int
    maximum: int


@dataclass(frozen=True)
class Profile:
    """One optimization profile."""

    name: str
    sizes: Mapping[str, Range]
    """Name of a varying dimension -> its range."""


def profiles_for(source: OnnxSource, lengths: Lengths) -> tuple[Profile, ...]:
    """The profiles of a graph, its index of each being its position.

    Raises NirvanaError, before any build, for lengths that contradict each other, that are longer than the
    model's context or than a cache of fixed length, or for a graph whose varying dimensions are unknown.
    """
    names = _varying(source)
    batch, longest, prompt, length = _checked(
        lengths, slots=cache_slots(source), context=source.context_tokens
    )
    makers = {
        "sequence_length": _decoder_profiles,
        "encoder_sequence_length": _encoder_profiles,
        "decoder_sequence_length": _seq2seq_decoder_profiles,
    }
    for name in ("decoder_sequence_length", "sequence_length", "encoder_sequence_length"):
        if name in names:
            profiles = makers[name](longest, prompt, length)
            break
    else:
        profiles = (Profile("fixed", {}),)
    profiles = tuple(Profile(p.name, {BATCH: batch, **p.sizes}) for p in profiles)
    unknown = sorted(names - set(profiles[0].sizes))
    if unknown:
        raise NirvanaError(
            f"{source.path} has varying dimensions that no profile of a language model knows: "
            f"{', '.join(unknown)}.",
            hint="Export it with this tool: nirvana-deploy export CHECKPOINT --out DIR --dtype fp16",
        )
    return profiles


def require_lengths(lengths: Lengths, *, context_tokens: int | None) -> None:
    """Raise NirvanaError for lengths that no graph of a model with such a context can take."""
    _checked(lengths, slots=None, context=context_tokens)


def shapes_of(source: OnnxSource, profile: Profile) -> ProfileRecord:
    """Smallest, optimal and largest shape of every input."""

    def shape(dimensions: tuple[Any, ...], end: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else getattr(profile.sizes[d], end) for d in dimensions)

    return ProfileRecord(
        name=profile.name,
        shapes={
            one.name: (
                shape(one.dimensions, "minimum"),
                shape(one.dimensions, "optimum"),
                shape(one.dimensions, "maximum"),
            )
            for one in source.inputs
        },
    )


def notes_on_rows(profiles: Sequence[ProfileRecord], weights_bytes: int, engine_bytes: int) -> Iterator[str]:
    """Say why an engine is so large where one of several profiles fixes its tokens [B, T] to one row."""
    tokens = [profile.shapes["input_ids"] for profile in profiles if "input_ids" in profile.shapes]
    rows = [math.prod(largest) for _, _, largest in tokens]
    beside_bytes = engine_bytes - weights_bytes
    if 1 in rows and max(rows) > 1 and beside_bytes > weights_bytes / 2:
        yield (
            f"{format_bytes(beside_bytes)} lie beside {format_bytes(weights_bytes)} of weights: decode is "
            "fixed to one row, for which linears are stored a second time, in another layout. --max-batch 2 "
            "stores them once."
        )


def _decoder_profiles(longest: int, prompt: int, length: int) -> tuple[Profile, ...]:
    """Prefill from an empty past, and decode of one token behind 1 to S-1."""
    past = Range(1, max(1, length - 1), longest - 1)
    return (
        Profile(
            "prefill",
            {
                "sequence_length": Range(1, prompt, longest),
                "past_sequence_length": Range(0, 0, 0),
                "total_sequence_length": Range(1, prompt, longest),
            },
        ),
        Profile(
            "decode",
            {
                "sequence_length": Range(1, 1, 1),
                "past_sequence_length": past,
                "total_sequence_length": Range(past.minimum + 1, past.optimum + 1, past.maximum + 1),
            },
        ),
    )


def _encoder_profiles(longest: int, prompt: int, length: int) -> tuple[Profile, ...]:
    return (Profile("encoder", {"encoder_sequence_length": Range(1, prompt, longest)}),)


def _seq2seq_decoder_profiles(longest: int, prompt: int, length: int) -> tuple[Profile, ...]:
    """The first step, which fills the cache of the cross-attention, and the later ones, which read it."""
    encoder, past = Range(1, prompt, longest), Range(1, max(1, length - 1), longest - 1)
    empty, one = Range(0, 0, 0), Range(1, 1, 1)
    first = {
        "decoder_sequence_length": one,
        "encoder_sequence_length": encoder,
        "past_decoder_sequence_length": empty,
        "past_encoder_sequence_length": empty,
    }
    later = {**first, "past_decoder_sequence_length": past, "past_encoder_sequence_length": encoder}
    return Profile("prefill", first), Profile("decode", later)


def _varying(source: OnnxSource) -> set[str]:
    return {d for one in source.inputs for d in one.dimensions if isinstance(d, str)}


def cache_slots(source: OnnxSource) -> int | None:
    """C of a cache that is updated in place; None where the cache grows or there is none."""
    if source.kv != "in-place":
        return None
    slots = {one.dimensions[2] for one in _caches(source)}
    if len(slots) != 1 or not all(isinstance(one, int) for one in slots):
        raise NirvanaError(
            f"{source.path}: a cache updated in place must have one fixed length, "
            f"got {sorted(map(str, slots))}.",
            hint="nirvana-deploy export CHECKPOINT --flavor static-cache --cache-length 2048 --out DIR",
        )
    return int(slots.pop())


def _caches(source: OnnxSource) -> Iterator[Any]:
    return (one for one in source.inputs if one.name.startswith("past_key_values."))


def _checked(lengths: Lengths, *, slots: int | None, context: int | None) -> tuple[Range, int, int, int]:
    """(batch, longest sequence, prompt and sequence that are tuned for)."""
    batch = _range("--opt-batch", "--max-batch", 1, lengths.opt_batch, lengths.max_batch)
    longest = _longest(lengths, slots=slots, context=context)
    prompt = _within(lengths.opt_prompt, _DEFAULT_PROMPT_TOKENS, longest, "--opt-prompt")
    return batch, longest, prompt, _within(lengths.opt_length, _DEFAULT_PAST_TOKENS, longest, "--opt-length")


def _longest(lengths: Lengths, *, slots: int | None, context: int | None) -> int:
    """S: what was asked for, or the default, within the graph's and the model's limits."""
    asked = lengths.max_length
    if asked is None:
        asked = slots or min(_DEFAULT_LENGTH_TOKENS, context or _DEFAULT_LENGTH_TOKENS)
    if asked < 2:
        raise NirvanaError(f"--max-length must be at least 2 tokens (a prompt and an answer), got {asked}.")
    if slots is not None and asked > slots:
        raise NirvanaError(
            f"--max-length {asked} is longer than the graph's cache of {slots} slots.",
            hint=f"Export a longer one: --flavor static-cache --cache-length {asked}",
        )
    if context is not None and asked > context:
        raise NirvanaError(
            f"--max-length {asked} is longer than the model's context of {context} tokens.",
            hint=f"Pass --max-length {context}, or less.",
        )
    return asked


def _within(asked: int | None, default: int, longest: int, option: str) -> int:
    if asked is None:
        return min(default, longest)
    if not 1 <= asked <= longest:
        raise NirvanaError(
            f"{option} {asked} is not between 1 and the longest sequence, {longest} tokens.",
            hint="Change it, or --max-length.",
        )
    return asked


def _range(opt_option: str, max_option: str, minimum: int, optimum: int, maximum: int) -> Range:
    if not minimum <= optimum <= maximum:
        raise NirvanaError(
            f"{opt_option} {optimum} and {max_option} {maximum} are not a range from {minimum} on: "
            "minimum <= optimum <= maximum must hold.",
            hint=f"Pass {max_option} {max(optimum, minimum)}, or a smaller {opt_option}.",
        )
    return Range(minimum, optimum, maximum)
