"""``genai_config.json``: what onnxruntime-genai reads beside the ONNX file.

It refuses unknown keys at every level, so nothing of ours goes in. KV heads per layer are read by it
from the static dimensions of the ONNX inputs; the numbers here are only its defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.model.shape import ModelShape


def genai_config(
    config: PreTrainedConfig, shape: ModelShape, *, filename: str, flavor: str = "portable"
) -> dict[str, Any]:
    """The configuration of a decoder exported by ``onnx_export`` in ``flavor`` "portable" or "gqa".

    With "gqa" past and present share one buffer of ``max_length`` tokens, also where layers differ.
    """
    context_tokens = config.max_position_embeddings
    eos = config.eos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    positions = {} if flavor == "gqa" else {"position_ids": "position_ids"}  # gqa counts by itself
    return {
        "model": {
            "type": shape.family.name,
            "bos_token_id": config.bos_token_id if config.bos_token_id is not None else first_eos,
            "eos_token_id": eos,
            "pad_token_id": config.pad_token_id if config.pad_token_id is not None else first_eos,
            "vocab_size": shape.vocab_size,
            "context_length": context_tokens,
            "decoder": {
                "filename": filename,
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden_size,
                "num_attention_heads": max(layer.query_heads for layer in shape.layers),
                "num_key_value_heads": max(layer.kv_heads for layer in shape.layers),
                "num_hidden_layers": len(shape.layers),
                "session_options": {"provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **positions,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": context_tokens,
            "do_sample": False,
            "past_present_share_buffer": flavor == "gqa",
        },
    }


@contextmanager
def genai_tokens(folder: Path) -> Iterator[Callable[[NDArray[np.int64], int], list[int]]]:
    """Load ``folder`` in onnxruntime-genai and yield a greedy generator: (prompt [1, T], count) -> new ids.

    It ends at a stop token of the config, which onnxruntime-genai leaves out of the result. Raises
    NirvanaError when onnxruntime-genai refuses the folder.
    """
    import onnxruntime_genai  # an optional extra: imported when it is asked for

    try:
        model = onnxruntime_genai.Model(str(folder))
    except RuntimeError as error:
        unknown = "It takes no key that it does not know. " if "nknown value" in str(error) else ""
        raise NirvanaError(
            f"onnxruntime-genai cannot load {folder}: {error}.",
            hint=f"{unknown}genai_config.json is written anew by: "
            f"nirvana-deploy export CHECKPOINT --out {folder} --force",
        ) from error

    def generate(prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = prompt.shape[1] + new_tokens
        parameters.set_search_options(max_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt[0].astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[prompt.shape[1] :]]

    yield generate
