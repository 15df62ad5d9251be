"""What a recovery takes on paper, from bytes and operations: which way of training fits on which GPU.

    python benchmarks/recover_bounds.py [--shape 8b] [--sparsity 0.2] [--tokens 10M] [--share 0.4]

Nothing is run. Weights, gradients and moments are float32, products bfloat16 on a GPU, as recovery trains; a
way fits if these and the activations of one window of 256 tokens leave a tenth of the memory. Seconds are
operations at --share of the rate that the maker states for dense bfloat16, so they are a bound that a real
run will not reach without work. The states of a stored teacher lie on disk.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from scale import SHAPES  # the script beside this one

from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.recover.budget import budget_of

GPUS = {"24 GB (RTX 4090)": (24e9, 165e12), "80 GB (H100)": (80e9, 989e12), "141 GB (H200)": (141e9, 989e12)}
"""Name -> memory in bytes, bfloat16 operations a second by its data sheet, without sparsity."""
WAYS = (
    ("distill", "live"),
    ("distill", "stored"),
    ("lora", "live"),
    ("lora", "stored"),
    ("layers", "one block"),
)
_WINDOW_TOKENS, _ADAPTERS = 256, 0.005
"""Tokens whose activations are held at once; share of the weights that adapters of rank 8 are, about."""
_ACTIVATIONS = 34 * 2
"""Bytes that a layer keeps of a token and hidden unit (Korthikanti et al., arXiv 2205.05198)."""


@dataclass(frozen=True)
class Cost:
    """Of one way to train."""

    memory_bytes: float
    operations: float
    """A token."""
    disk_bytes: float
    """A token, of states on disk."""


def cost(shape: ModelShape, *, sparsity: float, method: str, teacher: str) -> Cost:
    """Memory on the device, operations and disk of training a cut of ``shape``."""
    linear, cut = shape.linear_parameters, shape.linear_parameters * (1 - sparsity)
    ends, head = shape.embedding_parameters, shape.vocab_size * shape.hidden_size
    window = _WINDOW_TOKENS * shape.hidden_size
    if method == "layers":
        block = linear / len(shape.layers)
        memory = 4 * block + 16 * block * (1 - sparsity) + _ACTIVATIONS * window
        return Cost(memory, 2 * linear + 6 * cut, 0.0)
    trained = cut * (_ADAPTERS if method == "lora" else 1.0)
    memory = 4 * (cut + ends) + 12 * trained + _ACTIVATIONS * window * len(shape.layers)
    backward = 2 * cut if method == "lora" else 4 * cut  # weights that stay need no gradient
    operations = 2 * cut + backward + 3 * 2 * head
    if teacher == "live":
        return Cost(memory + 4 * (linear + ends), operations + 2 * (linear + head), 0.0)
    return Cost(memory, operations + 2 * (linear + head), 2 * shape.hidden_size + 4)


def table(shape: ModelShape, *, sparsity: float, tokens: int, share: float) -> str:
    """Markdown: a line a way, minutes where it fits."""
    lines = [
        f"| method | teacher | memory | disk | {' | '.join(GPUS)} |",
        "| --- | --- | ---: | ---: |" + " ---: |" * len(GPUS),
    ]
    for method, teacher in WAYS:
        found = cost(shape, sparsity=sparsity, method=method, teacher=teacher)
        times = [
            f"{found.operations * tokens / (share * rate) / 60:.0f} min"
            if found.memory_bytes < 0.9 * memory_bytes
            else "does not fit"
            for memory_bytes, rate in GPUS.values()
        ]
        disk = f"{found.disk_bytes * tokens / 1e9:.0f} GB" if found.disk_bytes else ""
        lines.append(
            f"| {method} | {teacher} | {found.memory_bytes / 1e9:.0f} GB | {disk} | {' | '.join(times)} |"
        )
    return "\n".join(lines)


def on_paper(name: str, *, sparsity: float = 0.2, tokens: int = 10_000_000, share: float = 0.4) -> str:
    """The table of a shape of ``scale.py``, and what it is of."""
    shape = shape_from_config(SHAPES[name])
    return (
        f"Llama of the {name} shape at sparsity {sparsity:g}, {tokens:,} tokens, at {share:.0%} of each "
        f"GPU's stated rate:\n\n{table(shape, sparsity=sparsity, tokens=tokens, share=share)}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--tokens", default="10M", help="as --recover takes them")
    parser.add_argument("--share", type=float, default=0.4, help="of the GPU's stated rate")
    options = parser.parse_args()
    tokens = budget_of(options.tokens).tokens
    if tokens is None:
        parser.error("--tokens takes a number of tokens: 10M")
    print(on_paper(options.shape, sparsity=options.sparsity, tokens=tokens, share=options.share))


if __name__ == "__main__":
    main()
