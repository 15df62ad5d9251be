"""Calibration windows, drawn by seed, and held-out windows that no seed can draw.

The documents of a source become one token stream, EOS between them, cut into blocks of five segments: four
for calibration, the fifth held out. The cut depends on lengths, not on the seed, so held-out text is
disjoint from the calibration windows of every seed. A mixture is drawn part by part and interleaved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.calibrate.mixture import Part, interleaved, parts_of, split_by_share
from nirvana_deploy.calibrate.segments import Segments
from nirvana_deploy.calibrate.texts import SourceText, read_source
from nirvana_deploy.calibrate.tokenise import token_stream
from nirvana_deploy.model.reading import require_known_tokens

if TYPE_CHECKING:
    from nirvana_deploy.model.checkpoint import Checkpoint

_MOST_CHARACTERS_A_TOKEN = 16
"""Of running text; the mean is near 4 in English, and fewer in code."""


@dataclass(frozen=True)
class MixedPart:
    """One part of mixed windows."""

    source: str
    share: float
    """The share asked for; that of the windows is as near to it as their number allows."""
    text_sha256: str


@dataclass(frozen=True)
class TokenWindows:
    """Windows of tokens and their origin."""

    tokens: NDArray[np.int64]
    """[N, T]."""
    source: str
    """Readable name: "pydoc", "file notes.txt", "mix of self 0.5, pydoc 0.25, code 0.25", ..."""
    text_sha256: str
    """Of the whole source text, UTF-8, documents joined by a zero byte; of one file, that file's content;
    of a mixture, the parts' hashes."""
    seed: int | None
    """None for held-out windows and --eval-text, which depend on no seed."""
    positions: tuple[int, ...]
    """Start of each window in the token stream of its source."""
    draw: int = 0
    """Index of the set; sets of the same seed are disjoint."""
    parts: tuple[MixedPart, ...] = ()
    """Of a mixture; empty for a single source."""
    part_of_window: tuple[int, ...] = ()
    """Index into ``parts`` for each window; empty for a single source."""

    def taken(self, indices: Sequence[int]) -> TokenWindows:
        """The windows of these indices."""
        return replace(
            self,
            tokens=self.tokens[list(indices)],
            positions=tuple(self.positions[i] for i in indices),
            part_of_window=tuple(self.part_of_window[i] for i in indices if self.parts),
        )

    def by_part(self) -> tuple[TokenWindows, ...]:
        """The windows of each part of a mixture under the part's own name; of a single source, all."""
        if not self.parts:
            return (self,)
        return tuple(
            replace(
                self.taken([i for i, part in enumerate(self.part_of_window) if part == index]),
                source=part.source,
                text_sha256=part.text_sha256,
                parts=(),
                part_of_window=(),
            )
            for index, part in enumerate(self.parts)
        )


@dataclass(frozen=True)
class CandidateSets:
    """Calibration sets to choose from, and the windows that they are judged on."""

    calibrations: tuple[TokenWindows, ...]
    """[N, T] each, corpus by corpus; no two of one corpus share a window."""
    heldout: tuple[TokenWindows, ...]
    """[M, T_heldout] of each corpus, disjoint from all its calibration sets."""


@dataclass(frozen=True)
class CalibrationData:
    """Text of a pruning run."""

    calibration: TokenWindows
    """[N, T], drawn by seed; windows do not overlap."""
    heldout: TokenWindows
    """[M, T_heldout], the same for every seed, disjoint from all that any seed could draw."""


def calibration_data(
    source: str,
    tokenizer: Any,
    *,
    num_sequences: int,
    seq_len: int,
    seed: int,
    heldout_sequences: int,
    heldout_len: int,
    draw: int = 0,
    checkpoint: Checkpoint | None = None,
    progress: Progress = SILENT,
) -> CalibrationData:
    """Draw N = ``num_sequences`` windows of T = ``seq_len`` tokens, and hold M others out.

    ``source`` is "prose" (in the package), "pydoc" (the language reference inside this Python), "code" (its
    standard library), "self" (the model of ``checkpoint`` writes), a name in calib_sets/, a UTF-8 text or
    .jsonl file, or a mixture of them, "a:0.7,b:0.3" or "mix" (:mod:`~nirvana_deploy.calibrate.mixture`),
    whose windows are interleaved; ``tokenizer`` is the model's, from transformers. ``draw`` chooses among a
    seed's disjoint sets (:func:`calibration_candidates`). ``heldout_sequences`` may be 0. Raises NirvanaError
    for a source that is unknown, unreadable or too short (it says how much fits) and for shares that do not
    add up, MissingExtraError for a named set without ``datasets``.
    """
    if draw < 0:
        raise NirvanaError(f"draw must be at least 0, got {draw}.")
    sets = _candidate_sets(
        source,
        tokenizer,
        draws=range(draw, draw + 1),
        calibration_shape=(num_sequences, seq_len),
        heldout_shape=(heldout_sequences, heldout_len),
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )
    return CalibrationData(calibration=sets.calibrations[0], heldout=sets.heldout[0])


def calibration_candidates(
    corpora: Sequence[str],
    checkpoint: Checkpoint,
    *,
    candidates: int,
    num_sequences: int,
    seq_len: int,
    seed: int,
    heldout_sequences: int,
    heldout_len: int,
    progress: Progress = SILENT,
) -> CandidateSets:
    """Draw ``candidates`` disjoint calibration sets of each corpus, and hold M windows of each out of them.

    ``corpora`` are sources of :func:`calibration_data`. The sets are the draws 0, 1, ... of ``seed``, so
    :func:`calibration_data` gives each of them again; those of "self", which writes as much text as is asked,
    are the seeds ``seed``, ``seed + 1``, ... instead. Raises NirvanaError as :func:`calibration_data` does,
    and when a text has no room for so many.
    """
    if candidates < 1:
        raise NirvanaError(f"candidates must be at least 1, got {candidates}.")
    sets = [
        _candidate_sets(
            corpus,
            checkpoint.tokenizer,
            draws=range(candidates),
            calibration_shape=(num_sequences, seq_len),
            heldout_shape=(heldout_sequences, heldout_len),
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        for corpus in corpora
    ]
    return CandidateSets(
        calibrations=tuple(windows for one in sets for windows in one.calibrations),
        heldout=tuple(windows for one in sets for windows in one.heldout),
    )


def _candidate_sets(
    source: str,
    tokenizer: Any,
    *,
    draws: range,
    calibration_shape: tuple[int, int],
    heldout_shape: tuple[int, int],
    seed: int,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> CandidateSets:
    num_sequences, seq_len = calibration_shape
    heldout_sequences, heldout_len = heldout_shape
    for name, value, least in (
        ("num_sequences", num_sequences, 1),
        ("seq_len", seq_len, 1),
        ("seed", seed, 0),
        ("heldout_sequences", heldout_sequences, 0),
        ("heldout_len", heldout_len, 1),
    ):
        if value < least:
            raise NirvanaError(f"{name} must be at least {least}, got {value}.")
    parts = parts_of(source, writes_text=checkpoint is not None and checkpoint.shape.family.writes_text)
    if num_sequences < len(parts):
        raise NirvanaError(
            f"--calib {source} has {len(parts)} parts, which need a window each; num_sequences is "
            f"{num_sequences}.",
            hint=f"Pass --num-sequences {len(parts)} or more.",
        )
    shares = [part.share for part in parts]
    counts, heldout_counts = (split_by_share(n, shares) for n in (num_sequences, heldout_sequences))

    def of_part(index: int) -> CandidateSets:
        shapes = (counts[index], seq_len), (heldout_counts[index], heldout_len)
        if parts[index].source == "self":
            seeds = [seed + draw for draw in draws]
            return _written_by_model(checkpoint, tokenizer, *shapes, seeds, progress)
        drawn = _drawn_from_text(parts[index], tokenizer, draws, *shapes, seed, progress)
        if checkpoint is not None:
            for windows in (*drawn.calibrations, *drawn.heldout):
                require_known_tokens(windows.tokens, checkpoint.shape.vocab_size)
        return drawn

    # what the model writes takes longest, and the other parts may turn out too short
    order = sorted(range(len(parts)), key=lambda index: parts[index].source == "self")
    drawn = {index: of_part(index) for index in order}
    sets = [drawn[index] for index in range(len(parts))]
    if len(parts) == 1:
        return sets[0]
    return CandidateSets(
        calibrations=tuple(
            mixed(parts, [one.calibrations[i] for one in sets], seed, draw) for i, draw in enumerate(draws)
        ),
        heldout=(mixed(parts, [one.heldout[0] for one in sets]),),
    )


def mixed(
    parts: Sequence[Part], windows: Sequence[TokenWindows], seed: int | None = None, draw: int = 0
) -> TokenWindows:
    """Interleave the windows of the parts."""
    order = interleaved([len(one.tokens) for one in windows])
    mixed_parts = tuple(
        MixedPart(one.source, part.share, one.text_sha256) for part, one in zip(parts, windows, strict=True)
    )
    empty = np.empty((0, windows[0].tokens.shape[1]), np.int64)
    return TokenWindows(
        np.stack([windows[part].tokens[i] for part, i in order]) if order else empty,
        source=f"mix of {', '.join(f'{part.source} {part.share:.3g}' for part in mixed_parts)}",
        text_sha256=hashlib.sha256("\0".join(part.text_sha256 for part in mixed_parts).encode()).hexdigest(),
        seed=seed,
        positions=tuple(windows[part].positions[i] for part, i in order),
        draw=draw,
        parts=mixed_parts,
        part_of_window=tuple(part for part, _ in order),
    )


def _drawn_from_text(
    part: Part,
    tokenizer: Any,
    draws: range,
    calibration_shape: tuple[int, int],
    heldout_shape: tuple[int, int],
    seed: int,
    progress: Progress,
) -> CandidateSets:
    (num_sequences, seq_len), (heldout_sequences, heldout_len) = calibration_shape, heldout_shape
    text = read_source(part.source, tokenizer=tokenizer, progress=progress)
    stream = token_stream(text.documents, tokenizer, progress)
    segments = Segments(length=len(stream), seq_len=seq_len, heldout_len=heldout_len)
    segments.require(num_sequences, heldout_sequences, source=text.name, share=part.share)
    starts = segments.calibration_starts
    if draws.stop * num_sequences > len(starts):
        fits = len(starts) // num_sequences
        raise NirvanaError(
            f"{text.name} has room for {fits} disjoint calibration sets of {num_sequences} x {seq_len} "
            f"tokens; {draws.stop} were asked for.",
            hint=f"Pass --candidates {fits}, smaller sets (--num-sequences), or a longer text.",
        )
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(starts))
    heldout = segments.spread_heldout(stream, heldout_sequences, source=text.name)
    return CandidateSets(
        calibrations=tuple(
            _windows(
                stream,
                [starts[i] for i in drawn[draw * num_sequences : (draw + 1) * num_sequences]],
                seq_len,
                text,
                seed,
                draw=draw,
            )
            for draw in draws
        ),
        heldout=(_windows(stream, heldout, heldout_len, text, None),),
    )


def room_for(
    source: str,
    tokenizer: Any,
    *,
    seq_len: int,
    heldout_len: int,
    enough: int,
    progress: Progress = SILENT,
) -> Segments:
    """The layout of a text, whose ``calibration_starts`` are the windows that a seed could draw.

    ``enough`` windows are as good as more: of a text that surely has as many, which is not tokenised for it,
    the layout is that of the least it can have. Raises NirvanaError for a source that is unknown or
    unreadable.
    """
    text = read_source(source, tokenizer=tokenizer, progress=progress)
    surely = sum(len(document) for document in text.documents) // _MOST_CHARACTERS_A_TOKEN
    least = Segments(length=surely, seq_len=seq_len, heldout_len=heldout_len)
    if len(least.calibration_starts) >= enough:
        return least
    stream = token_stream(text.documents, tokenizer, progress)
    return Segments(length=len(stream), seq_len=seq_len, heldout_len=heldout_len)


def windows_of_text(
    text: SourceText,
    tokenizer: Any,
    *,
    seq_len: int,
    max_sequences: int | None = None,
    progress: Progress = SILENT,
) -> TokenWindows:
    """Return the first consecutive windows [M, T] of a text, at most ``max_sequences``.

    Raises NirvanaError when the text is shorter than one window.
    """
    stream = token_stream(text.documents, tokenizer, progress)
    starts = range(0, len(stream) - seq_len + 1, seq_len)[:max_sequences]
    if not starts:
        raise NirvanaError(
            f"{text.name} is too short: it has {len(stream):,} tokens with this model's tokenizer; "
            f"one window needs {seq_len:,}.",
            hint="Give a longer text, or shorter windows.",
        )
    return _windows(stream, starts, seq_len, text, None)


def _windows(
    stream: NDArray[np.int64],
    starts: Sequence[int],
    length: int,
    text: SourceText,
    seed: int | None,
    *,
    draw: int = 0,
) -> TokenWindows:
    tokens = np.stack([stream[s : s + length] for s in starts]) if starts else np.empty((0, length), np.int64)
    return TokenWindows(
        tokens,
        source=text.name,
        text_sha256=text.sha256,
        seed=seed,
        positions=tuple(starts),
        draw=draw,
    )


def _written_by_model(
    checkpoint: Checkpoint | None,
    tokenizer: Any,
    calibration_shape: tuple[int, int],
    heldout_shape: tuple[int, int],
    seeds: Sequence[int],
    progress: Progress,
) -> CandidateSets:
    """Calibration from the even random streams 2 x seed, held-out text from stream 1, which no seed gives."""
    from nirvana_deploy.calibrate.selfwrite import written_by_model

    if checkpoint is None:
        raise NirvanaError(
            "The calibration source 'self' needs the model's checkpoint, because the model writes it."
        )
    shapes = {**{2 * seed: calibration_shape for seed in seeds}, 1: heldout_shape}
    written = written_by_model(checkpoint, shapes=shapes, progress=progress)

    def windows(stream: int, recorded_seed: int | None) -> TokenWindows:
        tokens = written[stream]
        text = SourceText("self", tuple(tokenizer.batch_decode(tokens)))
        return _windows(
            tokens.ravel(), range(0, tokens.size, tokens.shape[1]), tokens.shape[1], text, recorded_seed
        )

    return CandidateSets(
        calibrations=tuple(windows(2 * seed, seed) for seed in seeds), heldout=(windows(1, None),)
    )
