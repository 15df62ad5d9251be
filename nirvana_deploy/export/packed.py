"""Linears that read one value as one product: how such a product is named, and what the name stands for.

A product of q, k and v, or of gate and up, has the weights of its linears side by side along N. Its weight is
the initializer ``<parent>.<leaf>+<leaf>.weight`` and its bias ``<parent>.<leaf>+<leaf>.bias``, the leaves in
the order in which they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

_PACKED = "+"


def packed_name(names: Sequence[str]) -> str:
    """Of the linears ``names``, siblings, as one: ``model.layers.0.mlp.gate_proj+up_proj``."""
    (parent,) = {parent_of(name) for name in names}
    return f"{parent}.{_PACKED.join(name.rpartition('.')[2] for name in names)}"


def unpacked_names(name: str) -> tuple[str, ...]:
    """The linears that ``name`` stands for: those of :func:`packed_name`, or itself."""
    parent, dot, leaves = name.rpartition(".")
    return tuple(f"{parent}{dot}{leaf}" for leaf in leaves.split(_PACKED))


def parent_of(name: str) -> str:
    """``model.layers.0.mlp`` of ``model.layers.0.mlp.up_proj``."""
    return name.rpartition(".")[0]
