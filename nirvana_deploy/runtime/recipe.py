"""Options for running a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nirvana_deploy.base.recipe import Option, recipe
from nirvana_deploy.runtime.table import RUNTIMES

Threads = Annotated[
    int | None,
    Option("Threads of ONNX Runtime, or of OpenVINO. [all physical cores]", minimum=1, resumable=True),
]


@recipe
class Place:
    """Where a model runs."""

    runtime: Annotated[
        str | None,
        Option("What runs the model. [an engine's own, else onnxruntime-cpu]", choices=RUNTIMES),
    ] = None
    threads: Threads = None


@recipe
class Generation:
    """A generated answer."""

    prompt: Annotated[str, Option("Text to continue.")]
    max_new_tokens: Annotated[int, Option("Maximum tokens of the answer.", minimum=1)] = 128
    chat: Annotated[bool, Option("Put the prompt into the model's chat template.")] = False
    variant: Annotated[
        str | None,
        Option(
            "Model of an output folder: dense, pruned, pruned-w4, ... "
            "[the report's recommendation; with --runtime, which it may not fit: pruned]"
        ),
    ] = None
    tokenizer: Annotated[
        Path | None,
        Option(
            "Folder with the tokenizer. [the model's own, or the one of its output folder]",
            existing_folder=True,
        ),
    ] = None
