"""Training with one block of each model in memory: toward the dense states behind it, block after block.

Each block reads what the trained ones before it give, so it also learns to make up for them. The loss is the
mean over positions of ``|h - h_dense|^2 / |h_dense|^2``; windows set aside decide for each block whether it
keeps what it learnt. Blocks that are done wait on disk, and a killed training goes on behind the last one.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from nirvana_deploy.base.artifact import whole_file
from nirvana_deploy.base.progress import Advance, Progress
from nirvana_deploy.base.resources import disk_errors, require_memory
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.weights import SafetensorsWeights, joined
from nirvana_deploy.prune.streaming.model import States, StreamedModel, Turn, micro_batches
from nirvana_deploy.recover.data import TrainingText
from nirvana_deploy.recover.learning.compared import mean_kl
from nirvana_deploy.recover.learning.losses import relative_error
from nirvana_deploy.recover.learning.rounded import round_while_training, settle, stored_name
from nirvana_deploy.recover.learning.student import NotFiniteError, require_finite
from nirvana_deploy.recover.loop import Course, Loop
from nirvana_deploy.recover.recipe import Recovery
from nirvana_deploy.recover.record import CurvePoint


class BlockByBlock:
    """One block of each model in memory at a time."""

    stored_teacher = False

    def __init__(self, cut: Checkpoint, dense: Checkpoint, recipe: Recovery, state: Path) -> None:
        self._cut, self._dense, self._recipe, self._state = cut, dense, recipe, state
        self.trained_parameters = cut.shape.linear_parameters
        """Norms and biases are trained as well, and not counted."""

    def seconds_of_step(self, seq_len: int) -> float:
        """In which all blocks take a step, from those of the first."""
        cut, recipe = self._cut, self._recipe
        random = torch.Generator().manual_seed(0)
        windows = torch.randint(0, cut.shape.vocab_size, (recipe.recover_batch, seq_len), generator=random)
        with closing(_side_by_side(cut, self._dense, windows, recipe.recover_batch)) as turns:
            wanted, turn = next(turns)
            seconds = 0.0
            _prepare(turn.block, recipe)
            for _ in range(2):  # the first one warms up
                started = time.perf_counter()
                with torch.no_grad():
                    target = wanted.runs[0]()
                torch.autograd.backward(_loss(turn, 0, target))
                seconds = time.perf_counter() - started
            settle(turn.block)
        return seconds * len(cut.shape.layers) / len(turn.layers)

    def make_ready(self, text: TrainingText, progress: Progress) -> None:
        """Nothing is needed."""

    def train(self, text: TrainingText, loop: Loop, progress: Progress) -> Course:
        """From the first block that no killed training left on disk."""
        label = f"Recovering layer by layer, {loop.steps} steps each"
        with progress.task(label, len(self._cut.shape.layers)) as advance:
            return train_layers(
                self._cut,
                self._dense,
                text.train.tokens,
                text.watching,
                self._recipe,
                loop,
                state=self._state,
                advance=advance,
            )

    def trained_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Of all blocks, in their stored dtypes."""
        blocks = SafetensorsWeights(self._state)
        return joined({name: blocks.load(name) for name in blocks.names()}, self._cut.shape).items()


def train_layers(
    cut: Checkpoint,
    dense: Checkpoint,
    train: NDArray[np.int64],
    watch: Sequence[NDArray[np.int64]],
    recipe: Recovery,
    loop: Loop,
    *,
    state: Path,
    advance: Advance,
) -> Course:
    """Train each block of ``cut`` on windows [N, T]; others, [M, T] of each kind, watch.

    Blocks go to the folder ``state``.

    A block whose loss is not finite stays as it was. Raises NotFiniteError where that leaves nothing better,
    NirvanaError for a full disk, and for memory that does not hold the states of all windows.
    """
    started, size = time.perf_counter(), loop.step_windows
    read = train[: len(train) - len(train) % size]
    windows = torch.from_numpy(np.concatenate([read, *watch]))
    require_memory(
        2 * 4 * windows.numel() * dense.shape.hidden_size,
        what=f"Recovery layer by layer, with the states of {windows.numel():,} tokens,",
        hint="Train on fewer tokens: --recover 50k, or --tokens 50000 of the command recover.",
    )
    batches = len(read) // size
    spoilt: NotFiniteError | None = None
    for wanted, turn in _side_by_side(cut, dense, windows, size):
        with torch.no_grad():
            wanted.left = [run().cpu() for run in wanted.runs]
        file = state / f"layer-{min(turn.layers):05}.safetensors"
        if file.is_file():
            _take(turn, load_file(file))
        else:
            _prepare(turn.block, recipe)
            spoilt = _train(turn, wanted.left, batches, loop) or spoilt
            found = _stored(turn, cut)
            with disk_errors(state), whole_file(file) as partial:
                save_file(found, partial)
            settle(turn.block)
            _take(turn, found)
        with torch.no_grad():
            turn.left = [run().cpu() for run in turn.runs]
        advance(len(turn.layers))
        last = (wanted.left[batches:], turn.left[batches:])
    models = StreamedModel(cut), StreamedModel(dense)
    watching = micro_batches(windows[len(read) :], size)
    wanted_states, *states = (
        torch.split(torch.cat(one), [len(kind) for kind in watch])
        for one in (last[0], models[0].last_states(watching), last[1])
    )
    divergences = [
        [mean_kl(*models, [one], [other]) for one, other in zip(kinds, wanted_states, strict=True)]
        for kinds in states
    ]
    seconds = round(time.perf_counter() - started, 3)
    taken = ((0, 0, 0.0), (loop.steps, loop.steps * size * train.shape[1], seconds))
    curve = tuple(CurvePoint(*point, *kinds) for point, kinds in zip(taken, divergences, strict=True))
    better = curve[1].chosen_by < curve[0].chosen_by
    if spoilt is not None and not better:
        raise spoilt
    return Course(
        curve=curve,
        kept_step=loop.steps if better else 0,
        steps_done=loop.steps,
        seconds=seconds,
        stopped=f"{spoilt.what}: that block stays as it was. To train it too, recover again with "
        f"{spoilt.gentler}."
        if spoilt is not None
        else "",
    )


def _side_by_side(
    cut: Checkpoint, dense: Checkpoint, windows: torch.Tensor, size: int
) -> Generator[tuple[Turn, Turn]]:
    """The blocks of the dense model, and those of the cut, on windows [N, T]."""
    both = (StreamedModel(one).walk(windows, micro_batch=size) for one in (dense, cut))
    yield from zip(*both, strict=True)


def _prepare(block: nn.Module, recipe: Recovery) -> None:
    block.requires_grad_()
    if recipe.recover_for is not None:
        round_while_training(block, recipe.recover_for)


def _loss(turn: Turn, number: int, wanted: torch.Tensor) -> torch.Tensor:
    states = turn.runs[number]()
    return relative_error(states.flatten(0, 1), wanted.to(states.device).flatten(0, 1))


def _train(turn: Turn, wanted: States, batches: int, loop: Loop) -> NotFiniteError | None:
    """Train a block in place on the first ``batches``; what does not help on the others is undone.

    So is what ended in a loss that is not finite, which is returned.
    """
    from transformers.optimization import get_scheduler

    before = {name: one.detach().clone() for name, one in turn.block.named_parameters()}
    error = _watched_error(turn, wanted, batches)
    optimizer = torch.optim.AdamW(
        turn.block.parameters(), lr=loop.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    name, shape = loop.scheduler
    schedule = get_scheduler(name, optimizer, loop.warm_up_steps, loop.steps, scheduler_specific_kwargs=shape)
    order = np.random.Generator(np.random.PCG64(loop.seed))
    numbers: list[int] = []
    spoilt: NotFiniteError | None = None
    for step in range(1, loop.steps + 1):
        numbers = numbers or order.permutation(batches).tolist()
        number = numbers.pop()
        loss = _loss(turn, number, wanted[number])
        try:
            rate = schedule.get_last_lr()[0]
            require_finite(float(loss.detach()), step=step, learning_rate=rate, peak_rate=loop.learning_rate)
        except NotFiniteError as found:
            spoilt = found
            break
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(turn.block.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    if not _watched_error(turn, wanted, batches) < error:
        with torch.no_grad():
            for name, one in turn.block.named_parameters():
                one.copy_(before[name])
    return spoilt


@torch.no_grad()
def _watched_error(turn: Turn, wanted: States, batches: int) -> float:
    numbers = range(batches, len(turn.runs))
    return sum(float(_loss(turn, number, wanted[number])) for number in numbers)


def _stored(turn: Turn, cut: Checkpoint) -> dict[str, torch.Tensor]:
    """The block's weights by checkpoint name, linears apart, in their stored dtypes."""
    names = {stored_name(name) for name, _ in turn.block.named_parameters()}
    return {
        f"{turn.prefix}.{name}": attrgetter(name)(turn.block)
        .detach()
        .to("cpu", cut.weights.dtype(f"{turn.prefix}.{name}"))
        .contiguous()
        for name in sorted(names)
    }


@torch.no_grad()
def _take(turn: Turn, weights: dict[str, torch.Tensor]) -> None:
    for name, one in turn.block.named_parameters():
        one.copy_(weights[f"{turn.prefix}.{name}"])
