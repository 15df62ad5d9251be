"""The linears that read units are found in every family, with what they read in a full forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_t5
from builders.plans import shape_of
from builders.tiny import write_tiny
from numpy.typing import NDArray
from torch import nn

from nirvana_deploy.model.checkpoint import Checkpoint, load_checkpoint
from nirvana_deploy.model.reading import teacher_forced
from nirvana_deploy.prune.refit.readers import (
    Reader,
    changed,
    importance,
    readers_of,
    set_columns,
    stored_as,
    up_to,
    watched,
)
from nirvana_deploy.prune.streaming.model import Runs, States, StreamedModel

WRITERS: dict[str, Callable[[Path], Path]] = {
    **{kind: partial(write_tiny, kind=kind) for kind in ("llama-biased", "qwen2", "qwen3", "gemma3")},
    **{kind: partial(tiny_t5.write_t5, kind=kind) for kind in tiny_t5.KINDS},
}


def by_transformers(
    folder: Path, linears: Sequence[tuple[str, str]], tokens: NDArray[np.int64]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight name -> (what the norm reads, what the linear reads) in one forward of the whole model."""
    model: Any = load_checkpoint(folder)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[name] = args[0]

    for norm, linear in linears:
        model.get_submodule(norm).register_forward_pre_hook(partial(keep, f"{linear} norm"))
        model.get_submodule(linear).register_forward_pre_hook(partial(keep, linear))
    inputs = {"input_ids": torch.from_numpy(tokens)}
    if model.config.is_encoder_decoder:
        read, written = map(torch.from_numpy, teacher_forced(tokens, start_token=0))
        inputs = {"input_ids": read, "decoder_input_ids": written}
    with torch.no_grad():
        model(**inputs)
    return {f"{linear}.weight": (seen[f"{linear} norm"], seen[linear]) for _, linear in linears}


def expected_readers(kind: str) -> list[tuple[str, str]]:
    """(norm, linear), in the order in which they run."""
    if kind not in tiny_t5.KINDS:
        before_ffn = "pre_feedforward_layernorm" if kind == "gemma3" else "post_attention_layernorm"
        names = (("input_layernorm", "self_attn.o_proj"), (before_ffn, "mlp.down_proj"))
        return [
            (f"model.layers.{n}.{norm}", f"model.layers.{n}.{linear}")
            for n in range(3)
            for norm, linear in names
        ]
    stacks = (
        ("encoder", 3, ["SelfAttention.o", "DenseReluDense.wo"]),
        ("decoder", 2, ["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"]),
    )
    return [
        (f"{stack}.block.{n}.layer.{place}.layer_norm", f"{stack}.block.{n}.layer.{place}.{linear}")
        for stack, blocks, linears in stacks
        for n in range(blocks)
        for place, linear in enumerate(linears)
    ]


@pytest.mark.parametrize("kind", WRITERS)
def test_readers_and_what_they_read_are_those_of_a_full_forward(
    kind: str, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    folder = WRITERS[kind](tmp_path)
    shape, linears = shape_of(folder), expected_readers(kind)
    expected = by_transformers(folder, linears, tokens)
    found: dict[str, Reader] = {}

    def visit(positions: Sequence[int], block: nn.Module, dense: Runs, _: Runs) -> tuple[States, States]:
        for reader in readers_of(shape, positions, block):
            found[reader.name] = reader
            for number, run in enumerate(dense):
                rows = slice(4 * number, 4 * number + 4)
                entered, inputs = up_to(reader, run)
                torch.testing.assert_close(entered, expected[reader.name][0][rows], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(inputs, expected[reader.name][1][rows], rtol=1e-5, atol=1e-5)
                if reader.ffn is not None:  # what lies between, alone
                    alone = reader.linear(inputs)
                    torch.testing.assert_close(reader.ffn_output(entered), alone)
        left = [run() for run in dense]
        return left, left

    model = StreamedModel(Checkpoint.open(folder))
    model.transform_blocks(torch.from_numpy(tokens), visit, micro_batch=4)
    assert list(found) == list(expected)
    for reader in found.values():
        layer = shape.layers[reader.position]
        _, prefix = shape.place(reader.position)
        assert reader.name.startswith(f"{prefix}.")
        assert (reader.groups is None) == (reader.ffn is not None)
        if reader.groups is None:
            assert reader.linear.in_features == layer.ffn_width
        else:
            assert reader.groups == layer.kv_heads
            assert reader.linear.in_features == layer.query_heads * shape.head_dim


def test_errors_count_by_the_size_of_the_state() -> None:
    states = torch.randn(2, 3, 8) * torch.tensor([0.1, 1.0, 50.0])[None, :, None]
    share = importance(states)
    assert share.shape == (2, 3, 1)
    torch.testing.assert_close((states * share).square().mean(-1), torch.ones(2, 3))
    assert importance(torch.zeros(1, 1, 4)).isfinite().all()


def test_hooks_see_and_change_and_go() -> None:
    linear, x, seen = nn.Linear(3, 2), torch.ones(1, 3), list[torch.Tensor]()
    plain = linear(x)
    with watched(linear, seen.append), changed(linear, lambda output: output + 1):
        torch.testing.assert_close(linear(x), plain + 1)
    assert torch.equal(linear(x), plain) and len(seen) == 1 and torch.equal(seen[0], x)
    with pytest.raises(KeyError), changed(linear, lambda output: output + 1):
        raise KeyError
    assert torch.equal(linear(x), plain)


def test_columns_are_set_and_the_others_silenced(tiny_llama: Path) -> None:
    linear = nn.Linear(4, 2)
    set_columns(linear, torch.tensor([1, 3]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert linear.weight.tolist() == [[0, 1, 0, 2], [0, 3, 0, 4]]
    weights, name = Checkpoint.open(tiny_llama).weights, "model.layers.0.mlp.down_proj.weight"
    assert stored_as(weights, name, torch.ones(2, 2, dtype=torch.float64).T).dtype == weights.dtype(name)
