"""What a training takes of memory and disk, counted from shapes before anything is loaded.

A forward pass in float32 keeps ``6 D + (c + 1) F + 2 (H + K) d`` numbers of each position and layer for its
way back, c being 3 for a gated FFN: counted by autograd in llama; qwen3 and gemma3 keep up to 1.4 times as
many. In bfloat16 it is 0.7 of that, and a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.resources import free_memory_bytes, require_free_bytes
from nirvana_deploy.base.units import format_bytes
from nirvana_deploy.model.reading import stack_lengths
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import stored_shapes
from nirvana_deploy.output.layout import RECOVERY_STATE
from nirvana_deploy.prune.streaming.loading import compute_device
from nirvana_deploy.prune.streaming.processes import count
from nirvana_deploy.quantize.schemes import scheme_named
from nirvana_deploy.recover.learning.dtype import in_bfloat16
from nirvana_deploy.recover.learning.losses import BLOCK_POSITIONS
from nirvana_deploy.recover.learning.sharding import is_sharded
from nirvana_deploy.recover.recipe import Recovery

_FLOAT32_BYTES, _BFLOAT16_BYTES = 4, 2
_GRADIENT_BYTES, _MOMENTS_BYTES = 4, 8
_STATE_BYTES = _FLOAT32_BYTES + _MOMENTS_BYTES
"""A parameter that is trained, in a saved state: itself, and its two moments."""
_SAVED_STATES = 3
"""The best one, the last one, and the one that is being written."""
_LOGITS_AT_ONCE = 3
"""Student's, teacher's, and the gradient, of a block of positions."""
_IN_BFLOAT16 = 0.7


@dataclass(frozen=True)
class Work:
    """What is trained on what, as far as it decides what is needed."""

    recipe: Recovery
    dense: ModelShape
    kept: float
    """Share of the linear weights that the cut has left."""
    seq_len: int
    micro_batch: int
    """Windows at a time in one process."""
    windows: int
    """That are read and watch, at most."""
    windows_are_known: bool
    """Not so where a budget is a time."""

    @property
    def trained_parameters(self) -> float:
        """Norms and biases are not counted."""
        linear = self.kept * self.dense.linear_parameters
        return self._adapted if self.recipe.recover_method == "lora" else linear

    @property
    def teacher_bytes(self) -> float:
        """Of the dense model in memory."""
        return _FLOAT32_BYTES * (self.dense.linear_parameters / _parts() + self.dense.embedding_parameters)

    @property
    def memory_bytes(self) -> float:
        """Without the dense model, at the very least."""
        held = self._by_layers if self.recipe.recover_method == "layers" else self._whole
        positions = min(BLOCK_POSITIONS, self.micro_batch * self.seq_len)
        return held + _LOGITS_AT_ONCE * _FLOAT32_BYTES * positions * self.dense.vocab_size

    @property
    def saved_bytes(self) -> float:
        """Of the states that are saved on the way."""
        if self.recipe.recover_method == "layers":
            return _FLOAT32_BYTES * self.trained_parameters
        if is_sharded():  # with what stays as it is
            weights = self.kept * self.dense.linear_parameters + self.dense.embedding_parameters
            return _SAVED_STATES * (_FLOAT32_BYTES * weights + _MOMENTS_BYTES * self.trained_parameters)
        return _SAVED_STATES * _STATE_BYTES * self.trained_parameters

    @property
    def stored_teacher_bytes(self) -> int:
        """The dense model's states on disk."""
        return stored_bytes(self.dense, self.windows, self.seq_len)

    @property
    def _adapted(self) -> float:
        """Weights of adapters beside the linears of the dense model, at most."""
        tables = (self.dense.vocab_size, self.dense.hidden_size)
        linears = (one for one in stored_shapes(self.dense).values() if len(one) == 2 and one != tables)
        return float(self.recipe.lora_rank * sum(map(sum, linears)))

    @property
    def _whole(self) -> float:
        """The cut, gradients, moments, and what a forward pass keeps."""
        linear = self.kept * self.dense.linear_parameters
        copies = _BFLOAT16_BYTES * linear if in_bfloat16(self.recipe) and not is_sharded() else 0.0
        trained = (_GRADIENT_BYTES + _MOMENTS_BYTES) * self.trained_parameters
        return (
            (_FLOAT32_BYTES * linear + copies + trained) / _parts()
            + _FLOAT32_BYTES * self.dense.embedding_parameters
            + self.kept_back_bytes
        )

    @property
    def _by_layers(self) -> float:
        """One block of each model, and the states of all windows in both."""
        layers = len(self.dense.layers)
        windows = self.windows if self.windows_are_known else 0
        states = windows * self.seq_len * self.dense.hidden_size
        block = self.dense.linear_parameters / layers
        weights = 2 * _FLOAT32_BYTES + _GRADIENT_BYTES + _MOMENTS_BYTES  # and as it was before
        return (
            (_FLOAT32_BYTES + weights * self.kept) * block
            + (0 if _on_gpu() else 2 * _FLOAT32_BYTES * states)  # those stay with the host
            + self.kept_back_bytes / layers
        )

    @property
    def kept_back_bytes(self) -> float:
        """What a forward pass of a micro-batch keeps in all layers."""
        shape = self.dense
        of_layers = [
            6 * shape.hidden_size
            + self.kept
            * (
                (shape.neuron_cost + 1) * one.ffn_width
                + 2 * shape.head_dim * (one.query_heads + one.kv_heads)
            )
            for one in shape.layers
        ]
        numbers = sum(of_layers)
        if self.recipe.recover_checkpointing:  # what enters each layer, and one layer again
            numbers = len(of_layers) * shape.hidden_size + max(of_layers)
        share = _IN_BFLOAT16 if in_bfloat16(self.recipe) else 1.0
        return share * _FLOAT32_BYTES * self.micro_batch * self.seq_len * numbers


def stored_bytes(dense: ModelShape, windows: int, seq_len: int) -> int:
    """What the dense model's states of so many windows take on disk."""
    return windows * stack_lengths(dense.family, seq_len)[-1] * (2 * dense.hidden_size + 4)


def stores_teacher(work: Work) -> bool:
    """Whether the dense model's states go to the disk."""
    recipe = work.recipe
    if recipe.recover_method == "layers" or recipe.recover_teacher == "live":
        return False
    return recipe.recover_teacher == "stored" or _free_bytes() < work.memory_bytes + work.teacher_bytes


def require_room(work: Work, place: Path) -> None:
    """Raise NirvanaError where memory, or the disk of the output folder ``place``, does not hold a training.

    It names what of method, teacher, windows at a time and length would do. What a killed training left on
    the disk is not needed again.
    """
    live = work.recipe.recover_teacher == "live" and work.recipe.recover_method != "layers"
    needed, free_bytes = work.memory_bytes + live * work.teacher_bytes, _free_bytes()
    if free_bytes < needed:
        raise _no_room(work, needed, free_bytes)
    stored = work.stored_teacher_bytes if stores_teacher(work) and work.windows_are_known else 0
    left = sum(one.stat().st_size for one in (place / RECOVERY_STATE).rglob("*") if one.is_file())
    require_free_bytes(place, max(0, int(work.saved_bytes) + stored - left), what="Recovery")


def told_of_teacher(work: Work) -> str | None:
    """What is said before the work of states that go to the disk."""
    if not stores_teacher(work):
        return None
    most = "" if work.windows_are_known else "at most "
    return (
        f"The dense model's states are going to take {most}{format_bytes(work.stored_teacher_bytes)} on disk "
        "while the cut is trained."
    )


def _free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0]) if _on_gpu() else free_memory_bytes()


def _parts() -> int:
    """Devices that share the layers; processes of one host share its memory whatever each of them holds."""
    return count() if is_sharded() and _on_gpu() else 1


def _on_gpu() -> bool:
    return compute_device().type == "cuda"


def _no_room(work: Work, needed: float, free_bytes: int) -> NirvanaError:
    beside = " beside the dense model" if needed > work.memory_bytes else ""
    how = f"{work.recipe.recover_method}{beside}, {work.micro_batch} windows of {work.seq_len} tokens"
    others = dict(_with_less(work))
    fitting = [f"{name} ({format_bytes(takes)})" for name, takes in others.items() if takes <= free_bytes]
    least = min(others, key=others.__getitem__)
    return NirvanaError(
        f"Recovery by {how} at a time, needs at least {format_bytes(needed)} of memory, and "
        f"{format_bytes(free_bytes)} are free.",
        hint=f"What would do: {', '.join(fitting)}."
        if fitting
        else f"End other programs: nothing would do here. The least is {least} "
        f"({format_bytes(others[least])}).",
    )


def _with_less(work: Work) -> Iterator[tuple[str, float]]:
    """(options, bytes) of what takes less than ``work``."""
    recipe = work.recipe
    if recipe.recover_method != "layers":
        if recipe.recover_teacher == "live":
            yield "--recover-teacher stored", work.memory_bytes
        if work.micro_batch > 1:
            yield "--recover-micro-batch 1", replace(work, micro_batch=1).memory_bytes
        if not recipe.recover_checkpointing:
            again = replace(recipe, recover_checkpointing=True)
            yield "--recover-checkpointing", replace(work, recipe=again).memory_bytes
        if recipe.recover_method != "lora" and recipe.recover_for is None:
            adapters = replace(recipe, recover_method="lora")
            yield "--recover-method lora", replace(work, recipe=adapters).memory_bytes
            one = replace(work, recipe=adapters, micro_batch=1)
            yield "--recover-method lora --recover-micro-batch 1", one.memory_bytes
        if count() == 1 and not (recipe.recover_for and scheme_named(recipe.recover_for).activation_bits):
            blocks = replace(recipe, recover_method="layers", recover_checkpointing=False)
            off = " --no-recover-checkpointing" if recipe.recover_checkpointing else ""
            yield f"--recover-method layers{off}", replace(work, recipe=blocks).memory_bytes
    else:
        if work.windows_are_known:
            yield "half the tokens", replace(work, windows=work.windows // 2).memory_bytes
        if work.micro_batch > 1:
            yield "--recover-batch 1", replace(work, micro_batch=1).memory_bytes
    half = work.seq_len // 2
    shorter = replace(work, seq_len=half, windows=2 * work.windows)
    yield f"a cut with --seq-len {half}", shorter.memory_bytes
