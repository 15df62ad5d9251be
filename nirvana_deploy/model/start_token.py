"""What the decoder of an encoder-decoder reads first: one rule, for every room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.base.errors import NirvanaError


def first_decoder_token(config: Mapping[str, Any], *, of: str) -> int:
    """``decoder_start_token_id`` of a parsed config.json, else its ``pad_token_id``.

    Raises NirvanaError, naming ``of``, where the config has neither.
    """
    start = config.get("decoder_start_token_id")
    token = config.get("pad_token_id") if start is None else start
    if not isinstance(token, int):
        raise NirvanaError(
            f"{of} names no decoder_start_token_id and no pad_token_id: "
            "nothing says what the decoder reads first.",
            hint="Add decoder_start_token_id to its config.json, or export the checkpoint again.",
        )
    return token
