"""What is known and not handled: each by name, with what it would need; a text part that is known is named.

Read in the modeling code of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nirvana_deploy.base.errors import NirvanaError

_EXPERTS = (
    "is a mixture of experts: a unit would be a neuron of one expert, or a whole expert, "
    "weighed by how often the router chooses it"
)
_NEEDED = {
    r"qwen3_5\w*|qwen3_next|qwen4_exp": "has linear attention (gated delta nets) in most layers, which have "
    "no KV heads, and gated attention in the others: FFNs alone could go, and an export needs both operators",
    r"gemma4\w*|gemma3n\w*": "has layers that share the keys and values of others, inputs of their own in "
    "every layer and heads of two sizes: FFNs alone could go, and an export needs all of these",
    r"gemma2|gemma": "caps its logits, or computes its norms otherwise than Gemma 3 does: "
    "the graph would need a soft cap in every attention",
    r"olmo3|olmo": "has norms in other places than OLMo 2",
    r"granitemoehybrid|lfm2|mamba2?|falcon_mamba|falcon_h1|jamba|bamba|nemotron_h|recurrent_gemma": "has "
    "layers with a state in place of keys and values: their blocks and their cache are not built here",
    r"mixtral|gpt_oss|dbrx|deepseek_v\w+|\w*moe\w*": _EXPERTS,
    r"bert|roberta|modernbert|xlm-roberta|deberta\w*": "is an encoder: it does not continue a text",
}
"""Pattern of ``model_type`` -> what keeps it out; the first that matches."""
_ROUTED = ("num_local_experts", "num_experts", "n_routed_experts")

TAKE_OUT = """\
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
whole = AutoModelForImageTextToText.from_pretrained("MODEL", dtype="auto")
text = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=whole.dtype)
text.model.load_state_dict(whole.model.language_model.state_dict())
text.lm_head.load_state_dict(whole.lm_head.state_dict())
text.save_pretrained("TEXT-PART")
AutoTokenizer.from_pretrained("MODEL").save_pretrained("TEXT-PART")"""
"""Python that saves the decoder of a vision-language model as a checkpoint of its own."""


def refusal(config: Mapping[str, Any], known: Mapping[str, str]) -> NirvanaError:
    """Why a parsed config.json is not handled; ``known`` are families by name with their architectures."""
    model_type, named = config.get("model_type"), config.get("architectures")
    what = f"model_type {model_type!r}, architectures {named}"
    text = config.get("text_config")
    if isinstance(text, dict) and text.get("model_type") in known:
        return NirvanaError(
            f"Unsupported: {what}, wraps a decoder for text beside other parts (text_config, model_type "
            f"{text['model_type']!r}), and that decoder alone is handled.",
            hint=f"Take it out with Python, then pass TEXT-PART:\n{TAKE_OUT}",
        )
    supported = ", ".join(f"{architecture} ({name})" for name, architecture in known.items())
    if routed := next((key for key in _ROUTED if config.get(key)), None):
        needed: str | None = f"{_EXPERTS} ({routed} = {config[routed]!r})"
    else:
        needed = next((why for one, why in _NEEDED.items() if re.fullmatch(one, str(model_type))), None)
    if needed is None:
        return NirvanaError(f"Unsupported architecture: {what}. Supported: {supported}.")
    return NirvanaError(f"Unsupported: {what}, {needed}.", hint=f"Supported: {supported}.")
