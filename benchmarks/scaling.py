"""How a search grows with nodes, and a cut with the model: on paper, from recorded costs.

    python benchmarks/scaling.py

Prints the tables of docs/howto/search.md. A search is played through: the first cut of all on one thread,
which makes what is shared; then every other one on the thread that is free first, at the CPU seconds that the
cuts of results/search-cost.json took. Nothing else is counted: no start, no timing, no waiting for files.
Layers are those of results/scale-*.json.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from scale import SHAPES  # the script beside this one

RESULTS = Path(__file__).resolve().parent / "results"
NODES, CUTS = (1, 8, 64), (5, 100, 1000)
_BFLOAT16_BYTES = 2
FILE_SYSTEM_BYTES_S = 1e9
"""A shared file system that takes this much is common."""
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_key_value_heads": 8, "head_dim": 128}
LAYERS = {"8B": 32, "70B": 80}


@dataclass(frozen=True)
class Played:
    """A search on some nodes."""

    points: int
    hours: float
    written_bytes_s: float
    """In the mean, of all nodes together."""

    @property
    def points_an_hour(self) -> float:
        """What it is for."""
        return self.points / self.hours


def main() -> None:
    """Print both tables."""
    print(tables())


def tables() -> str:
    """What docs/howto/search.md shows."""
    record = json.loads((RESULTS / "search-cost.json").read_text(encoding="utf-8"))
    return "\n".join([*_of_nodes(record), "", *_of_layers()])


def played(record: dict[str, Any], *, nodes: int, cuts: int) -> Played:
    """A search of ``cuts`` cuts, and the dense model, on ``nodes`` nodes like that of the record."""
    first, *others = record["cuts"]
    precisions = len(record["precision"].split(","))
    free = [first["cpu_s"]] * nodes * record["environment"]["logical_cores"]
    for cut in islice(cycle(others), cuts - 1):
        heapq.heappush(free, heapq.heappop(free) + cut["cpu_s"])
    written = first["bytes"] + sum(cut["bytes"] for cut in islice(cycle(others), cuts - 1))
    return Played((cuts + 1) * precisions, max(free) / 3600, written / max(free))


def _of_nodes(record: dict[str, Any]) -> list[str]:
    lines = [
        "| cuts | points | nodes | hours | points an hour | written, MB/s |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for cuts in CUTS:
        for nodes in NODES:
            found = played(record, nodes=nodes, cuts=cuts)
            cells = [f"{cuts:,}", f"{found.points:,}", f"{nodes}", f"{found.hours:.2f}"]
            cells += [f"{found.points_an_hour:,.0f}", f"{found.written_bytes_s / 1e6:,.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    shared, other = record["cuts"][0], record["cuts"][1:]
    mean_s = sum(cut["cpu_s"] for cut in other) / len(other)
    mean_bytes = sum(cut["bytes"] for cut in other) / len(other)
    limit = FILE_SYSTEM_BYTES_S * mean_s / mean_bytes / record["environment"]["logical_cores"]
    note = (
        f"The first cut takes {shared['cpu_s']:,.0f} CPU seconds, as it makes what is shared; every other "
        f"one {mean_s:,.0f} and {mean_bytes / 1e9:.1f} GB. A file system that takes "
        f"{FILE_SYSTEM_BYTES_S / 1e9:g} GB/s is the limit from {limit:,.0f} such nodes on."
    )
    return [*lines, "", note]


def _of_layers() -> list[str]:
    """A layer of the 8B shape as it was measured, and of 70B by the ratio of products and weights."""
    measured = json.loads((RESULTS / "scale-8b-2layers-best.json").read_text(encoding="utf-8"))
    stages, layer_bytes = measured["streamed"]["stages"], _BFLOAT16_BYTES * _weights(SHAPES["8b"])
    times = {name: stages[name]["cpu_s"] / measured["layers"] for name in ("curves", "refit")}
    products = _products(LLAMA_70B) / _products(SHAPES["8b"])
    weights = _weights(LLAMA_70B) / _weights(SHAPES["8b"])
    lines = [
        "| a layer | curves, CPU s | refit, CPU s | bfloat16, MB | layers | both of all layers, CPU hours |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, slower, larger in (("8B", 1.0, 1.0), ("70B", products, weights)):
        seconds = {stage: slower * taken for stage, taken in times.items()}
        cells = [f"{name}, {'measured' if slower == 1 else 'a ratio'}"]
        cells += [f"{taken:,.0f}" for taken in seconds.values()]
        cells += [f"{larger * layer_bytes / 1e6:,.0f}", f"{LAYERS[name]}"]
        cells.append(f"{LAYERS[name] * sum(seconds.values()) / 3600:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    tokens = measured["best_sequences"] * measured["seq_len"]
    note = (
        f"On {tokens:,} tokens. 70B was not run: its seconds are {products:.0f} times those of 8B, the ratio "
        f"of the products of an FFN's elimination (F\N{SUPERSCRIPT TWO} D), its bytes {weights:.1f} times, "
        "the ratio of weights."
    )
    return [*lines, "", note]


def _products(shape: dict[str, Any]) -> float:
    return float(shape["intermediate_size"] ** 2 * shape["hidden_size"])


def _weights(shape: dict[str, Any]) -> float:
    """Linear weights of a Llama layer whose query heads have the hidden width together."""
    hidden, kv = shape["hidden_size"], shape["num_key_value_heads"] * shape["head_dim"]
    return float(hidden * (2 * hidden + 2 * kv + 3 * shape["intermediate_size"]))


if __name__ == "__main__":
    main()
