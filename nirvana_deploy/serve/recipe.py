"""Options for serving a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nirvana_deploy.base.child import KEY_VARIABLE
from nirvana_deploy.base.recipe import Option, recipe


@recipe
class Serving:
    """A server of one model."""

    variant: Annotated[
        str | None,
        Option(
            "Model of an output folder to serve: dense, pruned, pruned-w4, ... [the report's recommendation]"
        ),
    ] = None
    model_name: Annotated[
        str | None, Option("Name by which clients ask for the model. [its folder and variant]")
    ] = None
    host: Annotated[
        str, Option("IP address to listen on; 0.0.0.0 lets other machines in, without encryption.")
    ] = "127.0.0.1"
    port: Annotated[int, Option("Port to listen on; 0 takes a free one.", minimum=0)] = 8000
    api_key_file: Annotated[
        Path | None,
        Option(f"File with the bearer token that requests must show. [variable {KEY_VARIABLE}, else none]"),
    ] = None
    slots: Annotated[int, Option("Answers that are written at a time, in one batch.", minimum=1)] = 4
    queue: Annotated[
        int, Option("Requests that may wait for a slot; more are answered 429 with Retry-After.", minimum=0)
    ] = 64
    max_prompt_tokens: Annotated[int | None, Option("Longest prompt. [the model's context]", minimum=1)] = (
        None
    )
    max_new_tokens: Annotated[
        int, Option("Longest answer, also of chats that name no length.", minimum=1)
    ] = 1024
    max_body: Annotated[int, Option("Largest request.", minimum=1024, size=True)] = 1 << 20
    request_seconds: Annotated[int, Option("Longest time for one request, waiting included.", minimum=1)] = (
        300
    )
    drain_seconds: Annotated[
        int, Option("Longest time for open answers once the server is told to end.", minimum=0)
    ] = 30
