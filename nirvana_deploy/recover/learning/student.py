"""What is trained: the pruned model with some of its parameters, and the loss toward the dense one.

Embedding and head stay: they are the dense model's, and the head's gradient would need all logits at once.
Of an adapter (LoRA, Hu et al., arXiv 2106.09685; ``peft``) the product is added to its linear in the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.recover.learning.losses import (
    BlockLoss,
    divergence,
    in_blocks,
    next_token,
    relative_error,
    total,
    weighted,
)
from nirvana_deploy.recover.learning.rounded import stored_name
from nirvana_deploy.recover.learning.states import StatesOf
from nirvana_deploy.recover.learning.teacher import Teacher
from nirvana_deploy.recover.recipe import Recovery, weights_of

_ALPHA_A_RANK, _DROPOUT = 2, 0.05
"""Of adapters: the settings of NIRVANA's authors."""


class Student(nn.Module):
    """The pruned model and its teacher, the dense one; ``forward`` is its mean loss a position."""

    _keys_to_ignore_on_save = None  # asked for by the Trainer

    def __init__(self, pruned: StatesOf, teacher: Teacher, recipe: Recovery) -> None:
        super().__init__()
        self.model: nn.Module = pruned.model
        self._pruned, self._teacher, self._recipe = pruned, teacher, recipe

    def forward(self, windows: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of windows [N, T] in nats; their ``numbers`` [N] are the teacher's."""
        states = self._pruned.states(windows).flatten(0, 1)
        following = self._pruned.next_tokens(windows).flatten()
        of_kl, of_next, of_states = weights_of(self._recipe)
        terms = [(of_next, next_token(self._pruned.logits(), following))]
        loss = states.new_zeros(())
        if of_kl or of_states:
            wanted = self.wanted_states(windows, numbers)
            terms.append((of_kl, divergence(self._pruned.logits(), self._teacher.logits(), wanted)))
            if of_states:
                loss = loss + of_states * relative_error(states, wanted)
        if of_kl or of_next:
            loss = loss + _mean(states, weighted(*terms))
        return {"loss": loss}

    def wanted_states(self, windows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The dense model's states [P, D] at the positions of windows [N, T]."""
        return self._teacher.wanted(windows, numbers)

    @torch.no_grad()
    def heldout_kl(self, windows: torch.Tensor, wanted: torch.Tensor) -> float:
        """Sum over the positions of windows [N, T] of KL(dense || pruned), nats."""
        states = self._pruned.states(windows).flatten(0, 1)
        return total(states, divergence(self._pruned.logits(), self._teacher.logits(), wanted))

    def positions(self, windows: torch.Tensor) -> int:
        """How many positions of windows [N, T] have logits."""
        return self._pruned.read(windows)[-1].numel()

    def trained(self) -> dict[str, torch.Tensor]:
        """What training changes, by name, and nothing else: what stays is in the pruned checkpoint."""
        return {name: one.detach() for name, one in self.named_parameters() if one.requires_grad}


def trainable(model: Any, recipe: Recovery) -> None:
    """Set which parameters of ``model`` are trained, in place; adapters are put in."""
    fixed = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for parameter in model.parameters():
        parameter.requires_grad_(recipe.recover_method != "lora" and id(parameter) not in fixed)
    if recipe.recover_method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        head = model.get_output_embeddings()
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        adapters = LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=_ALPHA_A_RANK * recipe.lora_rank,
            lora_dropout=_DROPOUT,
            target_modules=linears,
        )
        inject_adapter_in_model(adapters, model)


def trained_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the checkpoint, float32 tensor) of all that training may have changed; adapters are merged."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            module.merge()
            yield f"{name}.weight", module.base_layer.weight.detach()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            stored = stored_name(name)
            yield stored, attrgetter(stored)(model).detach()


class NotFiniteError(NirvanaError):
    """A loss is NaN or infinite: training is of no use from there on."""

    def __init__(self, loss: float, *, step: int, learning_rate: float, peak_rate: float) -> None:
        self.what = f"The loss is {loss} at step {step}, learning rate {learning_rate:.2g}"
        self.gentler = f"--learning-rate {peak_rate / 4:.2g}"
        super().__init__(
            f"{self.what}, and no state before it is better than the cut.",
            hint=f"Repeat the command with {self.gentler}; prune and prune-export take --resume with it.",
        )


def require_finite(loss: float, *, step: int, learning_rate: float, peak_rate: float) -> None:
    """Raise NotFiniteError for a loss that is NaN or infinite."""
    if not math.isfinite(loss):
        raise NotFiniteError(loss, step=step, learning_rate=learning_rate, peak_rate=peak_rate)


def probe(student: Student, windows: torch.Tensor, *, micro_batch: int) -> float:
    """Seconds of a step on ``windows`` [N, T]; changes nothing."""
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        for part in parts_of(windows, micro_batch):
            student(part, torch.arange(len(part)))["loss"].backward()
        seconds = time.perf_counter() - started
    student.zero_grad(set_to_none=True)
    return seconds


def parts_of(windows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Windows [N, T], or what belongs to each, at most ``size`` at a time."""
    return (windows[start : start + size] for start in range(0, len(windows), size))


def _mean(states: torch.Tensor, loss: BlockLoss) -> torch.Tensor:
    """Mean of a loss over positions [P, D], float32."""
    return (in_blocks(states, loss) / len(states)).to(states.dtype)
