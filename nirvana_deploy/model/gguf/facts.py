"""What a GGUF file says beyond what transformers' reader takes from it: translated, or refused by name.

llama.cpp computes what every key and tensor says, so nothing of a file may be left out without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError

ROPE_DIVISORS = "rope_freqs.weight"
"""Tensor [d/2]: what llama.cpp divides the rotary frequencies by."""
_READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "pooling_type": (0,),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Values that change nothing."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all Llama 3 say beside the factor."""


def require_known_keys(values: Mapping[str, Any], architecture: str, *, also: Collection[str] = ()) -> None:
    """Raise NirvanaError for a key that changes the computation and has no translation.

    ``values`` are those of the keys below ``architecture``, without its name; ``also`` are known as well.
    """
    for key, value in values.items():
        if key in _READ or key in also or value in _NEUTRAL.get(key, ()):
            continue
        raise NirvanaError(
            f"Unsupported: the GGUF file says {architecture}.{key} = {str(value)[:60]}, "
            "which llama.cpp computes and this tool has no translation for.",
            hint="Pass the Hugging Face folder of the model instead.",
        )
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(values.get(key), list):
            raise NirvanaError(
                f"Unsupported: the GGUF file has layers of different sizes ({architecture}.{key})."
            )
    _head_dim(values)


def config_changes(
    values: Mapping[str, Any],
    divisors: NDArray[np.float32] | None,
    tensors: Collection[str],
    *,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Keys of config.json that transformers' reader leaves at their defaults, as the file says them.

    ``divisors`` [d/2] are those of ROPE_DIVISORS, ``tensors`` the names of all, ``settings`` what the reader
    made of the file. Raises NirvanaError for a scaled rotary embedding where layers have different ones.
    """
    found: dict[str, Any] = {"rope_parameters": _rope_parameters(values, divisors)}
    several = any(isinstance(value, Mapping) for value in settings["rope_parameters"].values())
    if several and found.pop("rope_parameters")["rope_type"] != "default":
        raise NirvanaError("Unsupported: the GGUF file scales the rotary embeddings of different layers.")
    if "head_dim" in settings:
        found["head_dim"] = _head_dim(values)
    if "sliding_window" in settings and "attention.sliding_window" not in values:
        found["sliding_window"] = None
    for setting, parts in (("attention_bias", ("attn_q", "attn_output")), ("mlp_bias", ("ffn_up",))):
        if setting in settings:
            found[setting] = any(f"blk.0.{part}.bias" in tensors for part in parts)
    return found


def _head_dim(values: Mapping[str, Any]) -> int:
    """The size of a head; raises NirvanaError where keys, values and rotary embedding have different ones."""
    size = values.get("attention.key_length") or values["embedding_length"] // values["attention.head_count"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, size) != size:
            raise NirvanaError(
                f"Unsupported: the GGUF file has heads of {size} numbers and {key} {values[key]}."
            )
    return int(size)


def _rope_parameters(values: Mapping[str, Any], divisors: NDArray[np.float32] | None) -> dict[str, Any]:
    """The rotary embedding in the words of transformers, from the keys and divisors of llama.cpp.

    A scaling factor without a type is linear there. Any divisors are a LongRoPE whose factors are the same
    at every length.
    """
    plain = {"rope_type": "default", "rope_theta": float(values.get("rope.freq_base", 10000.0))}
    kind = values.get("rope.scaling.type", "linear")
    factor = float(values.get("rope.scaling.factor") or values.get("rope.scale_linear") or 1.0)
    context = int(values["context_length"])
    scale = float(values.get("rope.scaling.attn_factor", 1.0))
    if scale != 1.0 and kind != "yarn":
        raise NirvanaError(
            f"Unsupported: the GGUF file says rope.scaling.attn_factor = {scale:g} and "
            f"rope.scaling.type = {kind!r}; with 'yarn' alone another value than 1 is translated.",
            hint="Pass the Hugging Face folder of the model instead.",
        )
    if kind == "none" or (kind == "linear" and factor == 1.0):
        factor = 1.0
    elif kind == "yarn" and divisors is None:
        original = int(values.get("rope.scaling.original_context_length", context))
        more = {
            name: float(values[key])
            for name, key in (
                ("beta_fast", "rope.scaling.yarn_beta_fast"),
                ("beta_slow", "rope.scaling.yarn_beta_slow"),
            )
            if key in values
        }
        scale *= 0.1 * float(np.log(factor)) + 1.0
        said = {"factor": factor, "original_max_position_embeddings": original, "attention_factor": scale}
        return plain | {"rope_type": "yarn"} | said | more
    elif kind != "linear":
        raise NirvanaError(f"Unsupported: the GGUF file says rope.scaling.type = {kind!r}.")
    if divisors is None:
        return plain if factor == 1.0 else plain | {"rope_type": "linear", "factor": factor}
    divided = divisors.astype(np.float64) * factor
    llama3 = plain | {"rope_type": "llama3", "factor": float(divided.max()), **_LLAMA3}
    if np.allclose(_divisors_of_llama3(llama3, len(divided)), divided, rtol=1e-5):
        return llama3
    by_length = {"short_factor": divided.tolist(), "long_factor": divided.tolist()}
    return (
        plain
        | {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
        | {"original_max_position_embeddings": context, **by_length}
    )


def _divisors_of_llama3(parameters: Mapping[str, Any], count: int) -> NDArray[np.float64]:
    """What Llama 3 divides the frequencies by, [d/2]: nothing for short waves, the factor for long ones."""
    waves = 2 * np.pi * parameters["rope_theta"] ** (np.arange(count) / count)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] / waves
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: NDArray[np.float64] = 1.0 / (kept + (1.0 - kept) / parameters["factor"])
    return divisors
