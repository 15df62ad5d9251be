"""Text that streams out of any runner: tokens become words as soon as they are whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.text.chat import users_turn
from nirvana_deploy.model.text.stops import stop_ids
from nirvana_deploy.model.text.tokenizer import tokenizer_in
from nirvana_deploy.output.layout import CHECKPOINT, MODEL_FILE, ONNX, holds_model, is_checkpoint
from nirvana_deploy.runtime.openvino.ir import refuse_ir
from nirvana_deploy.runtime.runner import NoRoomError, Runner, greedy_tokens
from nirvana_deploy.runtime.table import runtime_named

_UNFINISHED = "�"  # what a tokenizer puts where the bytes of a character are not all there yet
_TOKENS_BEFORE = 8
"""Of a prompt, as many as may matter to how its continuation begins."""


@dataclass(frozen=True)
class Generation:
    """One streamed answer."""

    runtime: str
    text: str
    prompt_tokens: int
    new_tokens: int
    ttft_ms: float
    """Request to the first token's id."""
    tpot_ms: float | None
    """Mean gap between tokens; None for fewer than two."""
    stopped: bool
    """Whether the model ended by itself, with a stop token."""
    no_room: bool = False
    """Whether the context or the cache was full before the model had ended."""


def stream_text(
    runner: Runner,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    stops: frozenset[int] = frozenset(),
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue ``prompt`` greedily; ``on_text`` hears the text piece by piece.

    ``tokenizer`` is one of transformers. ``chat`` puts the prompt into its chat template as the user's turn.
    An answer ends where there is no room for more. Raises NirvanaError for a prompt of no tokens or without
    room, and for a chat template that is missing or refused.
    """
    ids = prompt_ids(tokenizer, prompt, chat=chat)
    if not ids:
        raise NirvanaError("The prompt has no tokens.", hint='Pass some text: --prompt "Once upon a time"')
    continued = not chat and runner.start_token is None  # else the answer is a text of its own
    pieces = TextPieces(
        tokenizer, on_text or (lambda _text: None), hidden=stops, after=ids if continued else ()
    )
    new_ids: list[int] = []
    stamps: list[float] = []
    no_room = False

    def heard(token: int) -> None:
        stamps.append(time.perf_counter())
        new_ids.append(token)
        pieces.add(token)

    start = time.perf_counter()
    try:
        greedy_tokens(
            runner,
            np.array([ids], dtype=np.int64),
            max_new_tokens=max_new_tokens,
            eos_token_ids=stops,
            on_token=heard,
        )
    except NoRoomError:
        if not new_ids:
            raise
        no_room = True
    text = pieces.finish()
    gaps = np.diff(stamps)
    return Generation(
        runtime=runner.runtime,
        text=text,
        prompt_tokens=len(ids),
        new_tokens=len(new_ids),
        ttft_ms=1e3 * (stamps[0] - start),
        tpot_ms=1e3 * float(gaps.mean()) if len(gaps) else None,
        stopped=new_ids[-1] in stops,
        no_room=no_room,
    )


class TextPieces:
    """Turns ids into text that never has to be taken back.

    A character may take several tokens, and what a token decodes to may depend on the one before it, so all
    ids are decoded together and only what has been added is passed on, up to the last whole character.
    ``after`` are the ids of the text that is continued, if any: some tokenizers leave out the space that a
    text begins with, and a character that the prompt began may be finished by what follows.
    """

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None],
        *,
        hidden: frozenset[int] = frozenset(),
        after: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._on_text, self._hidden = tokenizer, on_text, hidden
        self._ids = list(after[-_TOKENS_BEFORE:])
        self._before = self._tokenizer.decode(self._ids, skip_special_tokens=True) if self._ids else ""
        self._told = ""

    def add(self, token: int) -> None:
        """Hear one more id."""
        if token in self._hidden:
            return
        self._ids.append(token)
        text = self._decoded()
        if not text.endswith(_UNFINISHED):
            self._tell(text)

    def finish(self) -> str:
        """Pass on what is left, and return the whole text."""
        self._tell(self._decoded())
        return self._told

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text[_shared(self._before, text) :]

    def _tell(self, text: str) -> None:
        if len(text) > len(self._told):
            self._on_text(text[len(self._told) :])
            self._told = text


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = zip(one, other, strict=False)
    longest = min(len(one), len(other))
    return next((place for place, (left, right) in enumerate(pairs) if left != right), longest)


def text_of(tokenizer: Any, new_ids: Sequence[int], *, after: Sequence[int], hidden: frozenset[int]) -> str:
    """The text of ids that continue the prompt ``after``, as :func:`stream_text` gives it."""
    pieces = TextPieces(tokenizer, lambda _text: None, hidden=hidden, after=after)
    for token in new_ids:
        pieces.add(token)
    return pieces.finish()


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool = False) -> Sequence[int]:
    """The ids of a prompt [as the user's turn]; raises NirvanaError without a chat template that takes it."""
    if not chat:
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    if not tokenizer.chat_template:
        raise NirvanaError(
            "--chat needs a tokenizer with a chat template, and this one has none.",
            hint="Leave --chat out: the prompt is continued as plain text.",
        )
    of_chat: list[int] = tokenizer(users_turn(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    return of_chat


def model_in(path: Path, *, runtime: str | None = None) -> Path:
    """What to run: an engine file, ONNX folder or checkpoint as it is, the pruned model of an output folder.

    That is its checkpoint where ``runtime`` takes checkpoints, its ONNX folder otherwise.
    """
    refuse_ir(path)
    if path.is_file() or holds_model(path) or is_checkpoint(path):
        return path
    checkpoints = runtime is not None and runtime_named(runtime).takes == "checkpoint"
    inside = path / (CHECKPOINT if checkpoints else ONNX)
    if is_checkpoint(inside) if checkpoints else holds_model(inside):
        return inside
    raise NirvanaError(
        f"{path} holds no model: neither {MODEL_FILE} nor onnx/{MODEL_FILE}.",
        hint="nirvana-deploy export CHECKPOINT --out DIR",
    )


def tokenizer_folder(path: Path, *, given: Path | None = None) -> Path:
    """The folder with the tokenizer of an ONNX folder or an engine: ``given``, its own, or one nearby.

    Beside an engine lie the ONNX folder that it was built from (or it lies in it) and the checkpoint of the
    same output folder. Raises NirvanaError where there is none.
    """
    base = path if path.is_dir() else path.parent
    of_engine = [] if path.is_dir() else [base / f"{path.stem}-onnx", base.parent]
    nearby = [
        base,
        *of_engine,
        *(above / name for above in (base, base.parent) for name in ("onnx", "checkpoint")),
    ]
    for folder in [given] if given is not None else nearby:
        if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
            return folder
    raise NirvanaError(
        f"No tokenizer lies in {given or base}.", hint="Name its folder: --tokenizer out/checkpoint"
    )


def load_text_side(folder: Path) -> tuple[Any, frozenset[int]]:
    """The tokenizer of a folder, and the ids that end an answer; needs no checkpoint beside it."""
    tokenizer = _tokenizer(folder)
    return tokenizer, frozenset(stop_ids(folder))


def _tokenizer(folder: Path) -> Any:
    if (folder / "config.json").is_file() and (folder / "tokenizer_config.json").is_file():
        from nirvana_deploy.model.checkpoint import load_tokenizer  # imports torch

        return load_tokenizer(folder)  # knows configurations whose layers differ
    return tokenizer_in(folder)
