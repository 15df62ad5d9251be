"""Where the time of a pass goes: ONNX Runtime's own profile, by operator and by layer.

A session of its own, behind the timed rounds: the profiler costs about a microsecond per node. The fastest
half of the passes counts, as means, so that operators, the time between them and the time outside of the
session add up to the pass.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.measure.benchmark import prompt_of
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.worker import timed_round
from nirvana_deploy.quantize.schemes import SCHEMES
from nirvana_deploy.runtime.onnxruntime.providers import open_on_cpu

PRODUCTS = frozenset({"FusedMatMul", "Gemm", "MatMul"}).union(
    *(scheme.integer_kernels for scheme in SCHEMES.values())
)
"""Operators that multiply by stored matrices."""
ATTENTIONS = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})
HEAD, ELSEWHERE = "head", "elsewhere"
"""What lies in no layer."""
_LAYER = re.compile(r"\.(?:layers|block)\.(\d+)[./]")
_NODE = "_kernel_time"
_STEPS, _ROUNDS = 64, 3
"""Decode steps of a round at most, and rounds but for one that warms up: a profile has a million events."""


@dataclass(frozen=True)
class Node:
    """One operator of a pass."""

    name: str
    operator: str
    us: float
    last_dimension: int | None
    """Of its first output."""


@dataclass(frozen=True)
class Pass:
    """One run of a session."""

    us: float
    nodes: tuple[Node, ...]


@dataclass
class _Sum:
    us: float = 0.0
    nodes: set[str] = field(default_factory=set)


def profile_of(folder: Path, workload: Workload, *, threads: int) -> dict[str, Any]:
    """Profile prefill and decode of an ONNX folder on the CPU; returns ``{"prefill": ..., "decode": ...}``.

    The request is that of ``workload``, with at most 64 decode steps. Raises NirvanaError as
    ``open_on_cpu`` does, and for a profile that ends before the request does.
    """
    steps = min(workload.new_tokens - 1, _STEPS)
    with tempfile.TemporaryDirectory(prefix="nirvana-profile-") as scratch:
        with open_on_cpu(folder, threads=threads, profile=Path(scratch) / "profile") as runner:
            samples = []
            for index in range(1 + _ROUNDS):
                tokens = prompt_of(workload, index, vocab_size=runner.vocab_size)
                samples.append(timed_round(runner, tokens, new_tokens=steps + 1))
            vocab_size, files = runner.vocab_size, runner.end_profiling()
        rounds = [_rounds(list(passes_of(events_of(file))), 1 + _ROUNDS, file) for file in files]
    prefill = [[one[0] for one in session[1:]] for session in rounds]  # an encoder's, then a decoder's first
    decode = [[step for one in session[1:] for step in one[1:]] for session in rounds if len(session[0]) > 1]
    return {
        "prefill": summed(prefill, [one.prefill_ms for one in samples[1:]], vocab_size),
        "decode": summed(decode, [gap for one in samples[1:] for gap in one.itl_ms], vocab_size),
    }


def passes_of(events: Iterable[Mapping[str, Any]]) -> Iterator[Pass]:
    """The runs of a session, in order; a run's own event comes behind those of its nodes."""
    nodes: list[Node] = []
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_NODE):
            said = event["args"]
            outputs: list[dict[str, list[int]]] = said.get("output_type_shape") or [{}]
            shape = next(iter(outputs[0].values()), [])
            last = int(shape[-1]) if shape else None
            nodes.append(Node(event["name"].removesuffix(_NODE), said["op_name"], float(event["dur"]), last))
        elif event.get("name") == "model_run":
            yield Pass(float(event["dur"]), tuple(nodes))
            nodes = []


def events_of(file: Path) -> Iterator[dict[str, Any]]:
    """The events of a profile, which has one a line, without the whole of it in memory."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            text = line.strip().removeprefix("[").removesuffix("]").rstrip(",").strip()
            if text:
                yield json.loads(text)


def _rounds(passes: Sequence[Pass], count: int, file: Path) -> list[Sequence[Pass]]:
    """The passes of a session by round, each round alike."""
    each, rest = divmod(len(passes), count)
    if rest or not each:
        raise NirvanaError(
            f"ONNX Runtime's profile of {file.stem} ends early: {len(passes)} passes for {count} rounds.",
            hint="Profile fewer tokens: nirvana-deploy benchmark OUT --profile --new-tokens 16",
        )
    return [passes[each * index : each * (index + 1)] for index in range(count)]


def summed(sessions: Sequence[Sequence[Pass]], took_ms: Sequence[float], vocab_size: int) -> dict[str, Any]:
    """Means over the fastest half of passes, by what each ``took_ms``; a pass runs every session once."""
    order = sorted(range(len(took_ms)), key=lambda index: took_ms[index])
    counted = order[: max(1, len(order) // 2)]
    operators: dict[str, _Sum] = defaultdict(_Sum)
    layers: dict[str, _Sum] = defaultdict(_Sum)
    for number, session in enumerate(sessions):
        for index in counted:
            for node in session[index].nodes:
                for one in (operators[node.operator], layers[_part(node, vocab_size)]):
                    one.us += node.us
                    one.nodes.add(f"{number} {node.name}")
    scale = 1e-3 / len(counted)
    run_ms = fmean(sum(session[index].us for session in sessions) for index in counted) / 1e3
    kernels_ms = scale * sum(one.us for one in operators.values())
    pass_ms = fmean(took_ms[index] for index in counted)
    return {
        "passes": len(counted),
        "pass_ms": pass_ms,
        "kernels_ms": kernels_ms,
        "between_ms": run_ms - kernels_ms,
        "outside_ms": pass_ms - run_ms,
        "operators": [
            {"operator": name, "kind": _kind(name), "nodes": len(one.nodes), "ms": scale * one.us}
            for name, one in sorted(operators.items(), key=lambda item: -item[1].us)
        ],
        "layers": [
            {"layer": name, "nodes": len(one.nodes), "ms": scale * one.us}
            for name, one in sorted(layers.items(), key=lambda item: _in_order(item[0]))
        ],
    }


def _kind(operator: str) -> str:
    if operator in PRODUCTS:
        return "products"
    return "attention" if operator in ATTENTIONS else "other"


def _part(node: Node, vocab_size: int) -> str:
    """The layer that a node is of: its number, the head, or elsewhere."""
    found = _LAYER.search(f".{node.name}")
    if found:
        return found[1]
    return HEAD if node.last_dimension == vocab_size else ELSEWHERE


def _in_order(layer: str) -> tuple[int, str]:
    return (int(layer), "") if layer.isdecimal() else (1 << 30, layer)
