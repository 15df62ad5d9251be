"""``genai_config.json``: what onnxruntime-genai reads beside the ONNX file.

It refuses unknown keys at every level, so nothing of ours goes in. KV heads per layer are read by it
from the static dimensions of the ONNX inputs; the numbers here are only its defaults.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

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
            "type": shape.family.genai_type,
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
