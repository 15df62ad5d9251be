"""Models, plans and networks that tensorrt-rtx builds in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from builders.extras import needs
from builders.plans import shape_of
from builders.tiny import VOCABULARY, write_tokenizer
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.targets import BuilderOptions
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import PrunePlan, make_plan
from nirvana_deploy.prune.saliency.units import UnitScores

trt = needs("tensorrt_rtx")


CACHE_TOKENS = 64


LENGTHS = Lengths(max_batch=2, max_length=CACHE_TOKENS, opt_prompt=16, opt_length=32)


SMALL = BuilderOptions("tensorrt-rtx", targets=("sm86",))


KINDS = {
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
}


def write_model(folder: Path, kind: str) -> Path:
    """A random decoder with the smallest head_dim that fused attention takes, 12 query and 3 KV heads."""
    make, extra = KINDS[kind]
    config = make(
        hidden_size=48,
        num_attention_heads=12,
        num_key_value_heads=3,
        head_dim=16,
        intermediate_size=64,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def plan_of(dense: Path) -> PrunePlan:
    """A cut of ``dense`` into layers of different widths: KV groups 2 and 3, fewer FFN neurons."""
    shape = shape_of(dense)
    groups = (np.array([1.0, 9.0, 9.0]), np.array([9.0, 9.0, 9.0]))
    neurons = tuple(np.where(np.arange(64) < kept, 9.0, 0.1) for kept in (40, 56))
    scores = UnitScores(groups=groups, neurons=neurons)
    return make_plan(shape, scores, sparsity=0.2, round_to=8, saliency="nirvana")


def pruned_model(folder: Path, dense: Path) -> Path:
    """The checkpoint of ``dense`` cut by :func:`plan_of`."""
    slice_checkpoint(Checkpoint.open(dense), plan_of(dense), folder)
    return folder


def exported(checkpoint: Path, folder: Path, *, dtype: str = "fp16", in_place: bool = False) -> Path:
    flavor, tokens = ("static-cache", CACHE_TOKENS) if in_place else ("portable", None)
    onnx_from_checkpoint(Checkpoint.open(checkpoint), folder, dtype=dtype, flavor=flavor, cache_tokens=tokens)
    return folder


def network_of(path: Path) -> tuple[Any, Any]:
    """The parsed network, and the objects that it lives by."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(path))
    return network, (builder, parser)
