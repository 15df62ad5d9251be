"""Run whole windows of text through an ONNX folder, layer by layer, and look at any value inside its graphs.

A decoder reads a window as a prompt. In an encoder-decoder the encoder reads the first half and the decoder
the start token and the second half, as when the model was scored; the encoder's states go to the decoder.
Every flavor of the exporter is known by the inputs of its graphs. In memory is one layer (``cut.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.model.reading import first_decoder_token, teacher_forced
from nirvana_deploy.quantize.graph.layer_parts import Cut, Feeds

LOGITS = "logits"
ENCODER_STATES = "encoder_hidden_states"
LAST_HIDDEN_STATE = "last_hidden_state"
Found = tuple[int, dict[str, NDArray[Any]]]
"""Number of a window, and values by name."""


class Runner:
    """The graphs of one folder in CPU sessions of ONNX Runtime, a layer each; the files stay as they are."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        self._folder = folder
        cuts = [Cut(path, threads=threads) for path in sorted(folder.glob("*.onnx"))]
        self._cuts = sorted(cuts, key=lambda cut: LOGITS in cut.outputs)  # an encoder comes first

    def values(
        self,
        windows: NDArray[np.int64],
        *,
        outputs: Mapping[str, Sequence[str]],
        given: Sequence[Mapping[str, Feeds]] | None = None,
        label: str = "Running windows",
        progress: Progress = SILENT,
    ) -> Iterator[tuple[str, int, dict[str, NDArray[Any]]]]:
        """(file, window, values by name) of the values ``outputs``, by file, of ``windows`` [N, T].

        A window's values come in several pieces, those of an earlier layer first; windows are in order
        within a layer. ``given`` are further inputs by file, for each window.
        """
        prompts: list[dict[str, NDArray[Any]]]
        encoders = [cut for cut in self._cuts if LOGITS not in cut.outputs]
        prompts = [{"input_ids": window[None]} for window in windows]
        if encoders:
            start = decoder_start(self._folder)
            read, _ = teacher_forced(windows, start_token=start)
            prompts = [{"input_ids": window[None]} for window in read]
        with progress.task(label, sum(len(cut.ends) for cut in self._cuts)) as advance:
            for cut in self._cuts:
                file, states = cut.path.name, []
                wanted = [*outputs.get(file, ())]
                also = [LAST_HIDDEN_STATE] if cut in encoders and LAST_HIDDEN_STATE not in wanted else []
                whole = [{**prompt, **_of(file, given, index)} for index, prompt in enumerate(prompts)]
                for index, values in cut.run(whole, [*wanted, *also], advance=advance):
                    if cut in encoders and LAST_HIDDEN_STATE in values:
                        states.append(values[LAST_HIDDEN_STATE])
                    yield file, index, {name: values[name] for name in wanted if name in values}
                if cut in encoders:
                    prompts = decoder_prompts(windows, states, start=start)

    def logits(
        self,
        windows: NDArray[np.int64],
        *,
        given: Sequence[Mapping[str, Feeds]] | None = None,
        label: str = "Running windows",
        progress: Progress = SILENT,
    ) -> Iterator[NDArray[np.float32]]:
        """[T', V] of each of ``windows`` [N, T]: logits at the positions where the decoder read it."""
        outputs = {cut.path.name: [LOGITS] for cut in self._cuts if LOGITS in cut.outputs}
        if not outputs:
            raise NirvanaError(f"{self._folder} has no graph with an output 'logits'.")
        run = self.values(windows, outputs=outputs, given=given, label=label, progress=progress)
        for _, _, values in run:
            if LOGITS in values:
                yield values[LOGITS][0].astype(np.float32, copy=False)


def decoder_prompts(
    windows: NDArray[np.int64], states: Sequence[NDArray[Any]], *, start: int
) -> list[dict[str, NDArray[Any]]]:
    """What the decoder of an encoder-decoder reads of ``windows`` [N, T]; ``states`` are the encoder's."""
    read, written = teacher_forced(windows, start_token=start)
    return [
        {
            "input_ids": tokens[None],
            ENCODER_STATES: state,
            "encoder_attention_mask": np.ones_like(prompt[None]),
        }
        for prompt, tokens, state in zip(read, written, states, strict=True)
    ]


def decoder_start(folder: Path) -> int:
    """The token that the decoder of an ONNX ``folder`` starts from."""
    return first_decoder_token(read_json(folder / "config.json", dict[str, Any]))


def _of(file: str, given: Sequence[Mapping[str, Feeds]] | None, window: int) -> Feeds:
    return given[window].get(file, {}) if given is not None else {}
