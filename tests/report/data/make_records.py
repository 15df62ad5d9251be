"""Write the frozen records beside this file. They are SYNTHETIC: invented numbers, measured on no machine.

They have the schema and plausible sizes of SmolLM2-135M (30 layers, 3 KV groups, 1536 neurons) pruned to
sparsity 0.4, so that the report can be tested without a model. Run again only when a schema changes:
``python tests/data/report/make_records.py``, then read the diff.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.worker import RoundSample
from nirvana_deploy.measure.workloads.measured import comparisons_of, points_of, times_of
from nirvana_deploy.measure.workloads.named import NamedWorkload, Request, WorkloadFile
from nirvana_deploy.measure.workloads.sweep import Sweep
from nirvana_deploy.measure.workloads.turns import Answered

HERE = Path(__file__).parent
HIDDEN, HEAD_DIM, GROUPS, NEURONS, LAYERS, VOCABULARY = 576, 64, 3, 1536, 30, 49152
GROUP_WEIGHTS, NEURON_WEIGHTS = 2 * HEAD_DIM * 4 * HIDDEN, 3 * HIDDEN
EMBEDDING, NORMS = VOCABULARY * HIDDEN, (2 * LAYERS + 1) * HIDDEN
MEMORY_GB_PER_S, FLOAT_GOP_PER_S = 22.8, 118.0
random.seed(20)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def middle(index: int) -> float:
    """0 at the ends, 1 near the middle of the network, which loses most here."""
    return max(0.0, 1 - abs(2 * index / (LAYERS - 1) - 1.1))


group_counts = [
    GROUPS - (random.random() < 0.25 + 0.5 * middle(i)) - (random.random() < 0.55 * middle(i))
    for i in range(LAYERS)
]
# what attention does not give of the budget, the neurons give
linear_dense = LAYERS * (GROUPS * GROUP_WEIGHTS + NEURONS * NEURON_WEIGHTS)
neuron_budget = (0.6 * linear_dense - sum(group_counts) * GROUP_WEIGHTS) / NEURON_WEIGHTS
raw_counts = [0.95 - 0.6 * middle(i) + random.uniform(-0.06, 0.06) for i in range(LAYERS)]
neuron_counts = [min(NEURONS, 8 * round(raw / sum(raw_counts) * neuron_budget / 8)) for raw in raw_counts]
layers: list[dict[str, Any]] = [
    {
        "layer": index,
        "of_groups": GROUPS,
        "kept_groups": sorted(random.sample(range(GROUPS), groups)),
        "of_neurons": NEURONS,
        "kept_neurons": sorted(random.sample(range(NEURONS), neurons)),
    }
    for index, (groups, neurons) in enumerate(zip(group_counts, neuron_counts, strict=True))
]
kept_groups = sum(len(entry["kept_groups"]) for entry in layers)
kept_neurons = sum(len(entry["kept_neurons"]) for entry in layers)
linear_kept = kept_groups * GROUP_WEIGHTS + kept_neurons * NEURON_WEIGHTS
dense_parameters = linear_dense + EMBEDDING + NORMS
kept_parameters = linear_kept + EMBEDDING + NORMS

plan = {
    "schema": 1,
    "model": {
        "name": "smollm2",
        "family": "llama",
        "hidden_size": HIDDEN,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "query_heads_per_group": 3,
        "tied_embeddings": True,
    },
    "sparsity": 0.4,
    "gamma": 3.0,
    "saliency": "nirvana",
    "allocation": "global",
    "round_to": 8,
    "seed": 0,
    "calibration": {
        "source": "pydoc",
        "num_sequences": 32,
        "seq_len": 128,
        "text_sha256": digest("synthetic calibration"),
        "seed": 0,
    },
    "budget": {
        "asked_removed_share": 0.4,
        "met_removed_share": 1 - linear_kept / linear_dense,
        "removed_groups": LAYERS * GROUPS - kept_groups,
        "of_groups": LAYERS * GROUPS,
        "removed_neurons": LAYERS * NEURONS - kept_neurons + 41,
        "removed_neurons_after_rounding": LAYERS * NEURONS - kept_neurons,
        "of_neurons": LAYERS * NEURONS,
        "linear_parameters_dense": linear_dense,
        "linear_parameters_kept": linear_kept,
        "parameters_dense": dense_parameters,
        "parameters_kept": kept_parameters,
    },
    "layers": layers,
}


def latency(median_ms: float, count: int) -> dict[str, Any]:
    samples = [round(median_ms * random.lognormvariate(0, 0.025), 3) for _ in range(count)]
    for _ in range(count // 40):
        samples[random.randrange(count)] = round(median_ms * random.uniform(1.1, 1.35), 3)
    ordered = sorted(samples)
    points = {f"p{p}": ordered[min(count - 1, round(p / 100 * (count - 1)))] for p in (50, 90, 99)}
    return {**points, "samples": samples}


def bounded(
    took_ms: float, weights: int, read: int, written: int, logits: int, operations: int
) -> dict[str, Any]:
    moved = weights + read + written + logits
    memory_ms, products_ms = moved / MEMORY_GB_PER_S / 1e6, operations / FLOAT_GOP_PER_S / 1e6
    bound_ms = max(memory_ms, products_ms)
    return {
        "weight_bytes": weights,
        "cache_read_bytes": read,
        "cache_written_bytes": written,
        "logits_bytes": logits,
        "moved_bytes": moved,
        "operations": {"float32": operations},
        "operations_per_byte": operations / moved,
        "gop_per_s": operations / took_ms / 1e6,
        "gb_per_s": moved / took_ms / 1e6,
        "memory_ms": memory_ms,
        "products_ms": products_ms,
        "bound_ms": bound_ms,
        "share_of_bound": bound_ms / took_ms,
    }


def profiled(pass_ms: float) -> dict[str, Any]:
    shares = {
        ("MatMul", "products", 121): 0.84,
        ("GroupQueryAttention", "attention", 30): 0.06,
        ("SkipSimplifiedLayerNormalization", "other", 60): 0.02,
        ("Mul", "other", 30): 0.012,
        ("QuickGelu", "other", 30): 0.008,
    }
    parts = {**{str(index): 0.69 / LAYERS for index in range(LAYERS)}, "elsewhere": 0.01, "head": 0.24}
    return {
        "passes": 96,
        "pass_ms": pass_ms,
        "kernels_ms": 0.94 * pass_ms,
        "between_ms": 0.05 * pass_ms,
        "outside_ms": 0.01 * pass_ms,
        "operators": [
            {"operator": name, "kind": kind, "nodes": nodes, "ms": share * pass_ms}
            for (name, kind, nodes), share in shares.items()
        ],
        "layers": [
            {"layer": name, "nodes": 1 if name == "head" else 9, "ms": share * pass_ms}
            for name, share in parts.items()
        ],
    }


def variant(
    name: str,
    *,
    parameters: int,
    tpot_ms: float,
    prefill_ms: float,
    rss: int,
    kv: int,
    quality: dict[str, float],
) -> dict[str, Any]:
    tpot, prefill = latency(tpot_ms, 7), latency(prefill_ms, 7)
    read = 160 * kv
    products, logits = 2 * (parameters - NORMS), 4 * VOCABULARY
    return {
        "name": name,
        "path": "dense/onnx" if name == "dense" else "onnx",
        "runtime": "onnxruntime-cpu",
        "parameters": parameters,
        "weights_bytes": 4 * parameters + 20480,
        "prefill_ms": prefill,
        "ttft_ms": latency(prefill_ms * 1.02, 7),
        "tpot_ms": tpot,
        "itl_ms": latency(tpot_ms * 0.995, 7 * 63),
        "decode_tokens_per_s": 1000 / tpot["p50"],
        "achieved_gb_per_s": 4 * parameters / tpot["p50"] / 1e6,
        "peak_rss_bytes": rss,
        "peak_device_bytes": None,
        "roofline": {
            "prefill": bounded(prefill["p50"], 4 * parameters, 0, 128 * kv, 128 * logits, 128 * products),
            "decode": bounded(tpot["p50"], 4 * parameters, read, kv, logits, products),
        },
        "profile": {
            "prefill": profiled(1.01 * prefill["p50"]),
            "decode": profiled(1.08 * tpot["p50"]),
        },
        "kv_cache_bytes_per_token": kv,
        "quality": quality,
    }


decode_bytes_bound = (linear_dense + EMBEDDING) / (linear_kept + EMBEDDING)
kv_bytes = 2 * HEAD_DIM * 4
dense = variant(
    "dense",
    parameters=dense_parameters,
    tpot_ms=24.1,
    prefill_ms=431.0,
    rss=812_304_384,
    kv=LAYERS * GROUPS * kv_bytes,
    quality={
        "perplexity": 19.42,
        "kl_vs_dense": 0.0,
        "kl_standard_error": 0.0,
        "top1_agreement": 1.0,
        "tokens": 8128,
    },
)
pruned = variant(
    "pruned",
    parameters=kept_parameters,
    tpot_ms=24.1 / decode_bytes_bound / 0.976,
    prefill_ms=431 / 1.5712 / 0.94,
    rss=611_229_696,
    kv=kept_groups * kv_bytes,
    quality={
        "perplexity": 47.86,
        "kl_vs_dense": 0.914,
        "kl_standard_error": 0.0131,
        "top1_agreement": 0.584,
        "tokens": 8128,
    },
)
environment = {
    "python": "3.11.9",
    "platform": "Linux-6.1-x86_64",
    "cpu": "Example CPU @ 2.50GHz",
    "threads": 2,
    "memory_bytes": 8_589_934_592,
    "memory_bandwidth_gb_per_s": 23.4,
    "torch": "2.9.0",
    "transformers": "5.14.0",
    "onnxruntime": "1.23.2",
}
benchmark = {
    "schema": 1,
    "environment": environment,
    "ceilings": {
        "threads": 2,
        "read_gb_per_s": 23.4,
        "copy_gb_per_s": 19.1,
        "gop_per_s": {"float32": FLOAT_GOP_PER_S, "integer": 402.0},
        "measured_at": "2026-01-31T08:30:00+00:00",
        "memory_gb_per_s": MEMORY_GB_PER_S,
    },
    "workload": {
        "prompt_tokens": 128,
        "new_tokens": 64,
        "batch_size": 1,
        "repeats": 7,
        "warmup": 1,
        "threads": 2,
        "seed": 0,
    },
    "evaluation": {"source": "pydoc, held-out windows", "windows": 64, "window_tokens": 128},
    "variants": [dense, pruned],
    "comparisons": [
        {
            "variant": "pruned",
            "baseline": "dense",
            "tpot_speedup": dense["tpot_ms"]["p50"] / pruned["tpot_ms"]["p50"],
            "tpot_speedup_p10_p90": [1.41, 1.45],
            "tpot_speedup_interval": {"p50": 1.43, "low": 1.415, "high": 1.445, "confidence": 0.9883},
            "prefill_speedup_p10_p90": [1.43, 1.5],
            "prefill_speedup_interval": {"p50": 1.47, "low": 1.44, "high": 1.49, "confidence": 0.9883},
            "bound_tpot_speedup": decode_bytes_bound,
            "prefill_speedup": dense["prefill_ms"]["p50"] / pruned["prefill_ms"]["p50"],
            "bound_prefill_speedup": 1.5712,
        }
    ],
}


RUN = "0123456789abcdef"


def stage(seconds: float, peak_rss_bytes: int, files: list[str], result: Any = None) -> dict[str, Any]:
    return {
        "run": RUN,
        "seconds": seconds,
        "cpu_seconds": round(seconds * 1.6, 2),
        "peak_rss_bytes": peak_rss_bytes,
        "files": {name: digest(name) for name in files},
        "result": result or {},
    }


def verification(largest: float) -> dict[str, Any]:
    names = ["prefill 1x7", "prefill 1x33", "decode 5 steps with past", "batch 3, left-padded"]
    checks = [
        {"name": name, "max_abs_diff": largest * factor, "tolerance": 1e-3, "passed": True}
        for name, factor in zip(names, (0.4, 0.7, 1.0, 0.9), strict=True)
    ]
    greedy = [
        {
            "runtime": runtime,
            "prompts": 5,
            "new_tokens": 32,
            "equal_prompts": 5,
            "ties": 0,
            "passed": True,
            "not_run": None,
        }
        for runtime in ("onnxruntime", "onnxruntime-genai")
    ]
    return {"checks": checks, "greedy": greedy, "first_departure": None, "passed": True}


answers = {
    "new_tokens": 24,
    "prompts": ["The capital of France is", "def is_even(number):"],
    "variants": {
        "dense": [" Paris, which is | a <b>city</b>.", "\n    return number % 2 == 0"],
        "pruned": [" a * of_the French\x00", ""],
    },
}


def on_two_kinds(perplexity: float, kl: float) -> dict[str, Any]:
    def part(factor: float, tokens: int) -> dict[str, Any]:
        return {
            "perplexity": factor * perplexity,
            "kl_vs_dense": factor * kl,
            "kl_standard_error": 0.05 * factor * kl,
            "tokens": tokens,
        }

    return {"parts": {"pydoc": part(1, 8128), "code": part(1.5, 1020)}}


quality = {
    "source": "pydoc, held-out windows",
    "window_tokens": 128,
    "variants": {"dense": on_two_kinds(19.42, 0.0), "pruned": on_two_kinds(47.86, 0.914)},
    "calibrated": {"pydoc": True, "code": False},
}
tokenizer_files = ["genai_config.json", "tokenizer.json", "tokenizer_config.json"]
onnx_files = ["model.onnx", "model.onnx.data", *tokenizer_files]
checkpoint_files = ["config.json", "model.safetensors", "modeling_nirvana.py", "tokenizer.json"]
manifest = {
    "schema": 1,
    "tool": "nirvana-deploy 0.1.0",
    "command": "nirvana-deploy prune-export smollm2 --sparsity 0.4",
    "options": {"sparsity": 0.4, "benchmark": True, "baseline": True},
    "model": {
        "name": "smollm2",
        "origin": "alias smollm2 -> hub HuggingFaceTB/SmolLM2-135M-Instruct",
        "licence": "Apache-2.0",
        "files": {name: digest(name) for name in ("config.json", "model.safetensors")},
    },
    "environment": environment,
    "run": RUN,
    "complete": True,
    "makes": ["answers.json", "benchmark.json", "checkpoint", "dense/onnx", "onnx", "plan.json"],
    "files": {},
    "stages": {
        "calibrate": stage(1.62, 402_000_000, []),
        "score": stage(38.4, 1_720_000_000, []),
        "plan": stage(0.31, 640_000_000, ["plan.json"]),
        "checkpoint": stage(1.9, 905_000_000, [f"checkpoint/{name}" for name in checkpoint_files]),
        "onnx": stage(4.4, 980_000_000, [f"onnx/{name}" for name in onnx_files]),
        "dense-onnx": stage(6.2, 1_310_000_000, [f"dense/onnx/{name}" for name in onnx_files]),
        "verify": stage(
            17.8, 1_940_000_000, [], {"pruned": verification(3.1e-5), "dense": verification(4.6e-5)}
        ),
        "benchmark": stage(61.3, 820_000_000, ["benchmark.json"]),
        "quality": stage(29.5, 1_560_000_000, [], quality),
        "answers": stage(2.1, 1_010_000_000, ["answers.json"], answers),
        "workloads": stage(48.0, 1_090_000_000, ["workloads.json"]),
        "speculative": stage(95.0, 1_240_000_000, ["speculative/speculative.json"]),
    },
}


def answered(request: Request, factor: float) -> Answered:
    """What a model that is ``factor`` times as fast as dense answers."""

    def drawn(median_ms: float) -> float:
        return round(median_ms / factor * random.lognormvariate(0, 0.02), 3)

    prefill_ms = drawn(3.4 * request.batch_size * request.prompt_tokens)
    decode_ms = 24 + 0.004 * request.prompt_tokens + 1.5 * (request.batch_size - 1)
    gaps = tuple(drawn(decode_ms) for _ in range(request.new_tokens - 1))
    sample = RoundSample(prefill_ms=prefill_ms, ttft_ms=prefill_ms + 0.5, itl_ms=gaps)
    return Answered(request, sample, joules=None)


FACTORS = {"dense": 1.0, "pruned": 1.41}
CHAT = NamedWorkload(
    "chat",
    WorkloadFile(
        about="A chat: short questions and answers, one at a time.",
        prompt_tokens=(32, 64, 128),
        new_tokens=8,
        requests=12,
    ),
)
KV = {"dense": LAYERS * GROUPS * kv_bytes, "pruned": kept_groups * kv_bytes}
chatted = {name: [answered(one, factor) for one in CHAT.timed()] for name, factor in FACTORS.items()}
SWEEP = Sweep("context", (128, 512, 2048), Workload(new_tokens=8, repeats=7, threads=2))
swept = {
    value: {
        name: [answered(SWEEP.request(value, index), factor) for index in range(7)]
        for name, factor in FACTORS.items()
    }
    for value in SWEEP.values
}
swept_variants, swept_ratios = points_of(swept, "dense")
workloads = {
    "schema": 1,
    "workloads": [
        {
            "name": CHAT.name,
            "file": CHAT.to_json(),
            "environment": environment,
            "watch": {"samples": [], "cautions": ["The machine drifted: 2.10 ms at first, 2.40 ms at last."]},
            "energy_zones": [],
            "variants": [
                {
                    "name": name,
                    "load_ms": 512.0 / factor,
                    "peak_rss_bytes": int(812_304_384 / factor),
                    "peak_device_bytes": None,
                    "kv_cache_bytes": CHAT.longest().written_tokens * KV[name],
                    **times_of(chatted[name]),
                }
                for name, factor in FACTORS.items()
            ],
            "comparisons": comparisons_of(chatted, "dense"),
        }
    ],
    "sweeps": [
        {
            "axis": SWEEP.axis,
            "values": list(SWEEP.values),
            "workload": asdict(SWEEP.base),
            "environment": environment,
            "watch": {"samples": [], "cautions": []},
            "variants": swept_variants,
            "comparisons": swept_ratios,
        }
    ],
}

speculative = {
    "schema": 1,
    "target": "dense",
    "draft": "pruned",
    "prompts": 20,
    "new_tokens": 32,
    "threads": 8,
    "target_tokens_per_s": 57.5,
    "target_token_ms": 17.4,
    "rounds": [
        {
            "draft_tokens": count,
            "tokens_per_s": 57.5 * speedup,
            "speedup": speedup,
            "speedup_low": 0.9 * speedup,
            "speedup_high": 1.1 * speedup,
            "confidence": 0.959,
            "acceptance": 0.62,
            "tokens_per_round": 1 + 0.5 * count,
            "round_ms": 22.0 + 6 * count,
            "draft_ms": 6.0 * count,
            "verify_ms": 22.0,
            "cost": (22.0 + 6 * count) / 17.4,
            "break_even": break_even,
        }
        for count, speedup, break_even in ((1, 0.93, 0.71), (2, 1.18, 0.48), (3, 1.05, 0.66))
    ],
    "chosen": 2,
    "same_answers": {
        "passed": True,
        "greedy": [
            {
                "runtime": f"onnxruntime-genai with {count} draft tokens",
                "prompts": 20,
                "new_tokens": 32,
                "equal_prompts": 20,
                "ties": 0,
                "passed": True,
                "not_run": None,
            }
            for count in (1, 2, 3)
        ],
    },
}

RECORDS = {
    "manifest": manifest,
    "plan": plan,
    "benchmark": benchmark,
    "workloads": workloads,
    "speculative": speculative,
}
for name, record in RECORDS.items():
    (HERE / f"{name}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
