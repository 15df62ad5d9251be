"""Run a model forward and backward with one block's weights in memory at a time.

Backward keeps the states [N, T, D] that enter each block (``layer_states.py``), walks the blocks from last to
first, recomputes each and frees its gradients once they are used: 4/3 of the work of a plain backward. The
gradient of a context adds up over the blocks that read it and goes on to the stack before. Gradients are
those of a mean over sequences, so micro-batches change memory and nothing else. Arithmetic is float32
whatever the stored dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from nirvana_deploy.base.progress import SILENT, Advance, Progress
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.reading import stack_tokens
from nirvana_deploy.model.weights import RememberedWeights, WeightSource
from nirvana_deploy.prune.saliency.gradient import OutputGradient
from nirvana_deploy.prune.streaming.head import embedded, head_blocks, head_name, states_gradient
from nirvana_deploy.prune.streaming.layer_states import LayerStates
from nirvana_deploy.prune.streaming.loading import compute_device, loaded
from nirvana_deploy.prune.streaming.processes import Share, count, is_first, share_of
from nirvana_deploy.prune.streaming.stacks import Block, RunnableStack, stacks_of

States = list[torch.Tensor]
"""[n, T, D] per micro-batch."""
UseGradients = Callable[[Sequence[int], Mapping[str, nn.Parameter]], None]
"""Uses (positions in ``shape.layers``, the parameters of the block that holds them by checkpoint name, with
their gradients); the gradients may be kept or changed."""
BackwardVisit = Callable[[Sequence[int], nn.Module, Sequence[Callable[[], None]]], None]
"""(positions in ``shape.layers``, the block that holds them, for each micro-batch its way through the block
and back, each to be called once); parameters that require no gradient get none."""
Changes = Callable[[Sequence[int], nn.Module], Sequence[AbstractContextManager[None]]]
"""(positions, the block that holds them) -> changes of it, each in force while its context is open."""
Runs = list[Callable[[], torch.Tensor]]
"""One block on each micro-batch of the states that enter it: the states that leave it, [n, T, D].

They hold the states that enter: who has done with them clears the list.
"""
BlockVisit = Callable[[Sequence[int], nn.Module, Runs, Runs], tuple[States, States]]
"""(positions in ``shape.layers``, the block that holds them, its runs in the dense model and in the one being
made) -> the states that leave it in both."""
View = Callable[[WeightSource], WeightSource]
"""A checkpoint's weights as a plan would have them, or as they are."""
_Contexts = Sequence[torch.Tensor | None]
_Read = TypeVar("_Read")


@dataclass
class Turn:
    """One block on its way through the model; who gets it says what it leaves behind."""

    layers: Sequence[int]
    """Positions in ``shape.layers``."""
    prefix: str
    """Of the names of its weights in the checkpoint."""
    block: nn.Module
    runs: Runs
    left: States
    """The states that leave it, which enter the next."""


@dataclass(frozen=True)
class _Pass:
    """One stack on its way forward and back."""

    stack: RunnableStack
    batches: Sequence[torch.Tensor]
    """Tokens [n, T]."""
    states: LayerStates
    """Level i enters block i; on the way back, gradients take the place of the states."""


@dataclass(frozen=True)
class _Wish:
    """What is to become of the gradients."""

    output_gradient: OutputGradient
    visit: BackwardVisit
    sequences: int | None
    """f is averaged over so many; None: over each micro-batch."""
    advance: Advance


class StreamedModel:
    """A model of which one block at a time has weights."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: WeightSource | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        """``weights`` replace the checkpoint's own; ``device`` defaults to a GPU if torch sees one."""
        self.shape = checkpoint.shape
        self._config = checkpoint.config
        self._weights = weights or checkpoint.weights
        self._device = device or compute_device()
        self._stacks = stacks_of(checkpoint, device=self._device)

    def read(self, windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tokens that each stack reads of windows [N, T]; logits follow those of the last."""
        read = stack_tokens(self.shape.family, self._config, windows.numpy())
        return tuple(torch.from_numpy(tokens) for tokens in read)

    def next_tokens(self, windows: torch.Tensor) -> torch.Tensor:
        """The token that each position of the last stack is to predict; meaningless at the last position."""
        return self.read(windows)[-1].roll(-1, dims=1)

    def backward(
        self,
        windows: torch.Tensor,
        output_gradient: OutputGradient,
        use: UseGradients,
        *,
        micro_batch: int,
        together: bool = True,
        spill: bool | None = None,
        spill_folder: Path | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """Hand df/dw of each block to ``use``, from last to first, for windows [N, T].

        f is averaged over all N windows, which all processes share (the first one's ``use`` gets the sums);
        unless ``together``: then over each micro-batch, and ``use`` gets the gradients of each of them.
        Spilling is that of :class:`LayerStates`.
        """
        own, share = share_of(windows, micro_batch) if together else (windows, None)
        prefixes = {block.layers: block.prefix for stack in self._stacks for block in stack.blocks}

        def visit(layers: Sequence[int], block: nn.Module, turns: Sequence[Callable[[], None]]) -> None:
            parameters = dict(block.named_parameters(prefix=prefixes[tuple(layers)]))
            if share is not None:
                _add_up(block, turns, share)
                if is_first():
                    use(layers, parameters)
                return
            for turn in turns:
                turn()
                use(layers, parameters)
                block.zero_grad(set_to_none=True)

        self.visit_backward(
            own,
            output_gradient,
            visit,
            micro_batch=micro_batch,
            sequences=len(windows) if together else None,
            spill=spill,
            spill_folder=spill_folder,
            progress=progress,
        )

    def visit_backward(
        self,
        windows: torch.Tensor,
        output_gradient: OutputGradient,
        visit: BackwardVisit,
        *,
        micro_batch: int,
        sequences: int | None,
        label: str = "Scoring",
        spill: bool | None = None,
        spill_folder: Path | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """Take each block through windows [N, T] and back, from last to first, under the eyes of ``visit``.

        f is divided by ``sequences``; None: by those of each micro-batch.
        """
        tokens = [micro_batches(read, micro_batch) for read in self.read(windows)]
        steps = (2 * sum(len(stack.blocks) for stack in self._stacks) + 1) * len(tokens[0])
        with ExitStack() as opened:
            passes = []
            for stack, batches in zip(self._stacks, tokens, strict=True):
                states = LayerStates(
                    [(*batch.shape, self.shape.hidden_size) for batch in batches],
                    levels=len(stack.blocks) + 1,
                    spill=spill,
                    folder=spill_folder,
                    progress=progress,
                )
                passes.append(_Pass(stack, batches, opened.enter_context(states)))
            task = progress.task(f"{label} {windows.shape[0]} x {windows.shape[1]} tokens", steps)
            wish = _Wish(output_gradient, visit, sequences, opened.enter_context(task))
            self._there_and_back(passes, [None] * len(tokens[0]), wish)

    def _there_and_back(self, passes: Sequence[_Pass], contexts: _Contexts, wish: _Wish) -> _Contexts:
        """Run the first of ``passes``, then those after it, then back; returns the contexts' gradients."""
        one, *after = passes
        self._forward(one, contexts, wish.advance)
        last, norm = len(one.stack.blocks), self._norm(one.stack)
        if after:
            normed = [norm(self._on_device(one.states[last, number])) for number in range(len(contexts))]
            for number, gradient in enumerate(self._there_and_back(after, normed, wish)):
                leaf = self._on_device(one.states[last, number]).detach().requires_grad_()
                (passed_on,) = torch.autograd.grad(norm(leaf), leaf, gradient)
                one.states[last, number] = passed_on.cpu()
        else:
            head = head_blocks(self._weights, self.shape, self._device)
            for number, batch in enumerate(one.batches):
                gradient = states_gradient(
                    self._on_device(one.states[last, number]),
                    self._on_device(batch),
                    final=norm,
                    head=head,
                    output_gradient=wish.output_gradient,
                )
                one.states[last, number] = (gradient / (wish.sequences or len(batch))).cpu()
                wish.advance(1)
        return self._backward(one, contexts, wish)

    def _forward(self, one: _Pass, contexts: _Contexts, advance: Advance) -> None:
        for number, batch in enumerate(one.batches):
            one.states[0, number] = self._embedded(one.stack, batch)
        for index, block in enumerate(one.stack.blocks):
            with self._loaded(block) as module, torch.no_grad():
                for number, context in enumerate(contexts):
                    left = one.stack.run(module, self._on_device(one.states[index, number]), context)
                    one.states[index + 1, number] = left.cpu()
            advance(len(contexts))

    def _backward(self, one: _Pass, contexts: _Contexts, wish: _Wish) -> _Contexts:
        leaves = [None if context is None else context.detach().requires_grad_() for context in contexts]
        for index, block in reversed(list(enumerate(one.stack.blocks))):
            with self._loaded(block) as module:
                turns = [
                    partial(self._turn, one, index, module, number, context)
                    for number, context in enumerate(leaves)
                ]
                wish.visit(block.layers, module, turns)
            one.states.forget(index + 1)
            wish.advance(len(leaves))
        return [None if leaf is None else leaf.grad for leaf in leaves]

    def _turn(
        self, one: _Pass, index: int, module: nn.Module, number: int, context: torch.Tensor | None
    ) -> None:
        """One micro-batch through a block and back."""
        leaf = self._on_device(one.states[index, number]).detach().requires_grad_()
        left = one.stack.run(module, leaf, context)
        torch.autograd.backward(left, self._on_device(one.states[index + 1, number]))
        assert leaf.grad is not None
        one.states[index, number] = leaf.grad.cpu()

    def transform_blocks(self, windows: torch.Tensor, visit: BlockVisit, *, micro_batch: int) -> None:
        """Run windows [N, T] through the dense model and, beside it, through what ``visit`` makes of it."""
        dense: States = []
        made: States = []
        with torch.no_grad():
            for before, stack, tokens in self._in_order(self.read(windows)):
                batches = micro_batches(tokens, micro_batch)
                contexts = [self._contexts(before, left, len(batches)) for left in (dense, made)]
                dense = made = [self._embedded(stack, batch) for batch in batches]
                for block in stack.blocks:
                    with self._loaded(block) as module:
                        runs: list[Runs] = [
                            [
                                partial(self._run, stack, module, *one)
                                for one in zip(states, read, strict=True)
                            ]
                            for states, read in zip((dense, made), contexts, strict=True)
                        ]
                        dense = made = []  # the visit may let go of them
                        dense, made = visit(block.layers, module, *runs)

    def walk(self, windows: torch.Tensor, *, micro_batch: int) -> Iterator[Turn]:
        """Go through the blocks on windows [N, T]; ``left`` of each must be set before the next one."""
        left: States = []
        for before, stack, tokens in self._in_order(self.read(windows)):
            batches = micro_batches(tokens, micro_batch)
            with torch.no_grad():
                contexts = self._contexts(before, left, len(batches))
                left = [self._embedded(stack, batch) for batch in batches]
            for block in stack.blocks:
                with self._loaded(block) as module:
                    entering = zip(left, contexts, strict=True)
                    runs: Runs = [partial(self._run, stack, module, *one) for one in entering]
                    turn = Turn(block.layers, block.prefix, module, runs, left=[])
                    yield turn
                    left = turn.left

    def branches(self, windows: torch.Tensor, changes: Changes, *, progress: Progress = SILENT) -> States:
        """The states [N, T, D] that leave the last block for windows [N, T]: dense, then those of branches.

        A branch is the dense model but for one of the ``changes`` of one block; branches are in the order in
        which blocks run and their changes are listed.
        """
        states: States = []
        depth = sum(len(stack.blocks) for stack in self._stacks)
        with torch.no_grad(), progress.task("Measuring one layer at a time", depth) as advance:
            for before, stack, tokens in self._in_order(self.read(windows)):
                contexts = list(self._contexts(before, states, 1))
                states = [self._embedded(stack, tokens)] * len(contexts)
                for block in stack.blocks:
                    with self._loaded(block) as module:
                        pairs = zip(states, contexts, strict=True)
                        after = [self._run(stack, module, *one).cpu() for one in pairs]
                        for change in changes(block.layers, module):
                            with change:
                                after.append(self._run(stack, module, states[0], contexts[0]).cpu())
                    contexts += contexts[:1] * (len(after) - len(contexts))
                    states = after
                    advance(1)
        return states

    def last_states_of(
        self,
        views: Sequence[View],
        batches: Sequence[torch.Tensor],
        *,
        advance: Advance = lambda steps: None,
    ) -> list[States]:
        """The states that leave the last block, for each view and each of ``batches`` [n, T] of windows.

        Each block is read once for all views. ``advance`` counts ``shape.layers``, once per view.
        """
        remembered = RememberedWeights(self._weights)
        seen = [view(remembered) for view in views]
        read = zip(*map(self.read, batches), strict=True)
        hidden: list[States] = [[] for _ in views]
        with torch.no_grad():
            for before, stack, tokens in self._in_order(read):
                contexts = [self._contexts(before, left, len(batches)) for left in hidden]
                hidden = [[self._embedded(stack, batch) for batch in tokens] for _ in views]
                for block in stack.blocks:
                    for number, weights in enumerate(seen):
                        with self._loaded(block, weights) as module:
                            ones = zip(hidden[number], contexts[number], strict=True)
                            hidden[number] = [self._run(stack, module, *one).cpu() for one in ones]
                        advance(len(block.layers))
                    remembered.forget()
        return hidden

    def last_states(self, batches: Sequence[torch.Tensor]) -> States:
        """The states that leave the last block, for each of ``batches`` [n, T] of windows."""
        [states] = self.last_states_of([lambda weights: weights], batches)
        return states

    def states_for_head(
        self, batches: Sequence[torch.Tensor], *, advance: Advance = lambda steps: None
    ) -> States:
        """The normed states [n, T, D] that the head reads, for each of ``batches`` [n, T] of windows.

        A factor on the logits is left out. ``advance`` counts ``shape.layers``.
        """
        [states] = self.last_states_of([lambda weights: weights], batches, advance=advance)
        norm = self._norm(self._stacks[-1], scaled=False)
        return [norm(self._on_device(one)).cpu() for one in states]

    def output_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Turns states that left the last block [..., D] into logits [..., V]; loaded once."""
        norm, head = self._norm(self._stacks[-1]), self._float32(head_name(self.shape))
        return lambda states: norm(self._on_device(states)) @ head.T

    def logits(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits [N, T, V] of windows [N, T]."""
        [states] = self.last_states([windows])
        return self.output_head()(states)

    def _in_order(self, read: Iterable[_Read]) -> Iterator[tuple[RunnableStack | None, RunnableStack, _Read]]:
        """(the stack before, if any; the stack; what it reads)."""
        return zip((None, *self._stacks[:-1]), self._stacks, read, strict=True)

    def _contexts(self, before: RunnableStack | None, left: States, batches: int) -> _Contexts:
        """What a stack reads of the states that ``left`` the one before it, if any."""
        if before is None:
            return [None] * batches
        norm = self._norm(before)
        return [norm(self._on_device(states)) for states in left]

    def _run(
        self, stack: RunnableStack, block: nn.Module, states: torch.Tensor, context: torch.Tensor | None
    ) -> torch.Tensor:
        return stack.run(block, self._on_device(states), context)

    def _embedded(self, stack: RunnableStack, tokens: torch.Tensor) -> torch.Tensor:
        return embedded(self._weights, self.shape, tokens, scale=stack.embedding_scale)

    def _norm(self, stack: RunnableStack, *, scaled: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
        weight, scale = self._float32(stack.norm), stack.scale if scaled else 1.0
        if stack.offset:
            weight = weight + stack.offset

        def norm(states: torch.Tensor) -> torch.Tensor:
            normed = nn.functional.rms_norm(states, weight.shape, weight, stack.epsilon)
            return normed if scale == 1 else normed * scale

        return norm

    def _loaded(self, block: Block, weights: WeightSource | None = None) -> AbstractContextManager[nn.Module]:
        return loaded(block.module, weights or self._weights, prefix=block.prefix, device=self._device)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)

    def _float32(self, name: str) -> torch.Tensor:
        return self._weights.load(name).to(self._device, torch.float32)


def _add_up(block: nn.Module, turns: Sequence[Callable[[], None]], share: Share) -> None:
    """Leave in the first process's ``block`` the gradients of all micro-batches, added in their order."""
    for number, turn in share.turns(turns):
        if turn is not None:
            turn()
        if count() == 1:
            continue
        gradients = [one.grad for one in block.parameters() if one.grad is not None]
        for sender, found in share.gathered(number, None if turn is None else gradients):
            if sender != number:
                for one, gradient in zip(gradients, found, strict=True):
                    one += gradient
        if not is_first():
            block.zero_grad(set_to_none=True)


def micro_batches(tokens: torch.Tensor, sequences: int) -> list[torch.Tensor]:
    """``tokens`` [N, T] as views [n, T] of at most ``sequences``."""
    return [tokens[start : start + sequences] for start in range(0, len(tokens), sequences)]
