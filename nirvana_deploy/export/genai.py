"""``genai_config.json``: what onnxruntime-genai reads beside the ONNX file.

It refuses unknown keys at every level, so nothing of ours goes in. KV heads per layer are read by it
from the static dimensions of the ONNX inputs; the numbers here are only its defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.text.stops import begin_and_pad, sampling_settings, stop_ids


def genai_config(
    checkpoint: Path,
    shape: ModelShape,
    *,
    filename: str,
    context_tokens: int,
    flavor: str = "portable",
) -> dict[str, Any]:
    """The configuration of a decoder exported by ``onnx_export`` in ``flavor`` "portable" or "gqa".

    ``checkpoint`` is the folder it was exported from, whose stop ids and sampling settings it gets.

    With "gqa" past and present share one buffer of ``max_length`` tokens, also where layers differ.
    """
    stops = [stop for stop in stop_ids(checkpoint) if stop < shape.vocab_size]
    begin, pad = begin_and_pad(checkpoint)
    spare = stops[0] if stops else 0  # it takes no null, and uses neither in one sequence
    positions = {} if flavor == "gqa" else {"position_ids": "position_ids"}  # gqa counts by itself
    return {
        "model": {
            "type": shape.family.genai_type,
            "bos_token_id": spare if begin is None else begin,
            **({"eos_token_id": stops if len(stops) > 1 else stops[0]} if stops else {}),
            "pad_token_id": spare if pad is None else pad,
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
            **sampling_settings(checkpoint),
            "past_present_share_buffer": flavor == "gqa",
        },
    }
