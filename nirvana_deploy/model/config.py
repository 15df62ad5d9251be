"""config.json as transformers reads it: its class says what a missing key means and what a value may be.

What the class would take and this project does not compute is refused here by name, before any work.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PRUNED_KEYS = ("per_layer_config", "pruned_layers")
"""What config.json of a model whose layers differ says beside the keys of the dense one."""
LONGROPE = "longrope"
_OWN_MODULE = "modeling_nirvana."
_MOST_LAYERS = 10_000
_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers")
_LARGEST = 1 << 53
"""Beyond it a whole number is not the same in every program that reads JSON."""
_WITH_TRANSFORMERS = "AutoModelForCausalLM.from_pretrained(FOLDER{}).save_pretrained(NEW)"
_FLOATING = {
    "bitsandbytes": _WITH_TRANSFORMERS.format(").dequantize("),
    "mxfp4": _WITH_TRANSFORMERS.format(", quantization_config=Mxfp4Config(dequantize=True)"),
    "compressed-tensors": _WITH_TRANSFORMERS.format(
        ", quantization_config=CompressedTensorsConfig(run_compressed=False)"
    ),
}
"""What gives floating weights back, by ``quant_method``."""
_IF_IT_CAN = "a quantization_config with dequantize=True, where transformers has one for it"


def completed(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Every key of a parsed ``config.json`` and of the config class of ``family``, with its defaults.

    Raises NirvanaError, naming the key, for what the class does not take.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    dense = {key: value for key, value in config.items() if key not in (*PRUNED_KEYS, "auto_map")}
    _require_plain_numbers(config)
    try:
        full = getattr(transformers, family.config_class)(**copy.deepcopy(dense)).to_dict()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise NirvanaError(
            f"config.json: {family.config_class} of transformers refuses it: {reason_of(error)}."
        ) from error
    return {**full, **{key: config[key] for key in PRUNED_KEYS if key in config}}


def require_computed_here(config: Mapping[str, Any], family: Family) -> None:
    """Raise NirvanaError if a parsed config.json asks for another computation than that of ``family``."""
    for key in ("is_causal", "use_bidirectional_attention"):
        asked = config.get(key)
        if asked is not None and asked is not (key == "is_causal") and not family.encoder_decoder:
            raise NirvanaError(
                f"Unsupported: config.json asks for attention to later tokens ({key} = {asked!r}), "
                "as encoders for embeddings have; only models that continue a text are handled."
            )
    known = {family.architecture, family.own_architecture, *family.other_architectures}
    named = config.get("architectures") or []
    if not isinstance(named, list) or not known.issuperset(map(str, named)):
        raise NirvanaError(
            f"Unsupported: config.json has architectures = {named!r}, which computes something else than "
            f"{family.architecture}, what this tool handles for model_type {family.name!r}.",
            hint=f'If the weights are those of a {family.architecture}, write "architectures": '
            f'["{family.architecture}"] there.',
        )
    for name, module in (config.get("auto_map") or {}).items():
        own = any(key in config for key in PRUNED_KEYS) and str(module).startswith(_OWN_MODULE)
        if name not in ("AutoTokenizer", "AutoProcessor") and not own:
            raise NirvanaError(
                f"Unsupported: config.json names code of its own, auto_map = {{{name!r}: {module!r}}}: "
                "this tool runs none, and what it computes is not known.",
                hint="If the model is a plain one all the same, remove auto_map from config.json.",
            )
    if quantization := config.get("quantization_config"):
        raise _already_quantized(quantization)


def _already_quantized(quantization: Any) -> NirvanaError:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    steps = _FLOATING.get(str(method).partition("_")[0], _IF_IT_CAN)
    return NirvanaError(
        "Unsupported: config.json asks for weights that are already quantized "
        f"(quantization_config, quant_method {method!r}).",
        hint=f"Start from the model that they were made of, or give floats back with transformers: {steps}",
    )


def _require_plain_numbers(config: Mapping[str, Any]) -> None:
    for key, number in _numbers(config):
        if not abs(number) < _LARGEST:  # NaN too
            raise NirvanaError(f"config.json: {key!r} is {str(number)[:40]}, which no model has.")
    for key in _DEPTHS:
        depth = config.get(key)
        if isinstance(depth, int) and depth > _MOST_LAYERS:
            raise NirvanaError(f"config.json: {key!r} is {depth:,}; the most is {_MOST_LAYERS:,} layers.")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _numbers(entry, str(name))
    elif isinstance(value, list):
        for entry in value:
            yield from _numbers(entry, key)
    elif isinstance(value, int | float):
        yield key, value


def reason_of(error: Exception) -> str:
    """The last line of a validator's message says what is wrong; the ones before say who found it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = lines[-1] if lines else type(error).__name__
    return words.removeprefix("TypeError: ").removeprefix("ValueError: ")[:300].rstrip(".")


def context_tokens(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model of ``config`` can place; None where it has no end.

    Of LongRoPE (Ding et al., arXiv 2402.13753) it is the length that the model was first trained for: beyond
    it all angles are others, transformers reads all tokens anew, and the keys in a cache would go stale.
    """
    longest: int | None = getattr(config, "max_position_embeddings", None)
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != LONGROPE or same_at_every_length(parameters):
        return longest
    trained: int | None = parameters.get("original_max_position_embeddings")
    return min((tokens for tokens in (trained, longest) if tokens is not None), default=None)


def limited(config: dict[str, Any], tokens: int | None) -> dict[str, Any]:
    """A config.json that asks for at most ``tokens``, for programs that know no other limit."""
    if tokens is None or config.get("max_position_embeddings") in (None, tokens):
        return config
    return config | {"max_position_embeddings": tokens}


def same_at_every_length(parameters: dict[str, Any]) -> bool:
    """Whether a LongRoPE has the angles of its first length at all."""
    return bool(parameters.get("short_factor", ()) == parameters.get("long_factor"))
