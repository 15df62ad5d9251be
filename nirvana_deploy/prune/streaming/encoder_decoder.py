"""Score an encoder-decoder (T5, Flan-T5) with one streamed backward pass; the decoder-only twin is score.py.

f needs decoder inputs, so the calibration text is read by teacher forcing: the encoder reads the first half
of a window, the decoder the start token and the second half. No text is masked and no end token is added:
the windows are those of every other family.

Forward, the encoder runs first; its normed output is the context of every decoder layer. Backward walks the
decoder from last to first, adds up the gradient of the context over all cross-attentions, takes it through
the encoder's final norm, and walks the encoder. One block at a time has weights. The position bias that all
layers of a stack share is computed in its first block and kept; its table belongs to no unit. Block borders
may go to disk (``borders.py``); the context and its gradient stay in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Advance, Progress
from nirvana_deploy.model.checkpoint import meta_model, read_config
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import WeightSource
from nirvana_deploy.prune.saliency.gradient import OutputGradient
from nirvana_deploy.prune.saliency.units import UnitScores, scored_tensors, unit_sums
from nirvana_deploy.prune.streaming.head import embedded, head_blocks, head_name, states_gradient
from nirvana_deploy.prune.streaming.layer_states import Borders
from nirvana_deploy.prune.streaming.loading import CPU, LayerVisit, home, loaded, micro_batches

View = Callable[[WeightSource], WeightSource]
"""A checkpoint's weights as a plan would have them, or as they are."""
Scores = dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Position in ``shape.layers`` -> (groups [K], neurons [F])."""


def teacher_forced(tokens: torch.Tensor, *, start_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(encoder input [N, T // 2], decoder input [N, T - T // 2 + 1]) of windows [N, T].

    The decoder reads the start token and the second half, so that its logits at every position but the last
    predict a token of the window. Raises NirvanaError for windows of less than 2 tokens.
    """
    if tokens.shape[1] < 2:
        raise NirvanaError(
            f"An encoder-decoder needs windows of at least 2 tokens, got {tokens.shape[1]}.",
            hint="Pass a larger --seq-len.",
        )
    half = tokens.shape[1] // 2
    start = torch.full((len(tokens), 1), start_token, dtype=tokens.dtype)
    return tokens[:, :half], torch.cat([start, tokens[:, half:]], dim=1)


@dataclass
class _Stack:
    """One stack while it is being walked."""

    name: str
    blocks: Sequence[nn.Module]
    mask: torch.Tensor | None = None
    """Added to attention logits: [1, 1, T, T]; None where every position sees all."""
    position_bias: torch.Tensor | None = None
    """[1, H, T, T], known once the first block has run."""


class StreamedEncoderDecoder:
    """A T5 of which one block at a time has weights; the rest lives on torch's meta device."""

    def __init__(
        self, checkpoint: Path, weights: WeightSource, shape: ModelShape, device: torch.device = CPU
    ) -> None:
        self._checkpoint = checkpoint
        self._config = read_config(checkpoint)
        self._model = meta_model(self._config)
        self._weights = weights
        self._shape = shape
        self._device = device

    def gradient_scores(
        self,
        tokens: torch.Tensor,
        output_gradient: OutputGradient,
        *,
        micro_batch: int,
        spill: bool | None = None,
        spill_folder: Path | None = None,
        progress: Progress = SILENT,
    ) -> UnitScores:
        """``|w * df/dw|`` summed over every unit, for windows [N, T]; f is averaged over the N sequences."""
        encoder_tokens, decoder_tokens = teacher_forced(tokens, start_token=self._start_token())
        read, batches = (
            micro_batches(encoder_tokens, micro_batch),
            micro_batches(decoder_tokens, micro_batch),
        )
        encoder, decoder = self._stacks(decoder_tokens.shape[1])
        label = f"Scoring {tokens.shape[0]} x {tokens.shape[1]} tokens"
        steps = (2 * (len(encoder.blocks) + len(decoder.blocks)) + 1) * len(batches)
        scores: Scores = {}
        with (
            self._borders(encoder, read, spill, spill_folder, progress) as encoding,
            self._borders(decoder, batches, spill, spill_folder, progress) as decoding,
            progress.task(label, steps) as advance,
        ):
            self._forward(encoder, read, encoding, advance)
            encoded = [encoding[len(encoder.blocks), number] for number in range(len(read))]
            context = [self._encoder_norm(states) for states in encoded]
            self._forward(decoder, batches, decoding, advance, context)
            self._output_gradients(decoding, len(decoder.blocks), batches, output_gradient)
            advance(len(batches))
            context_gradients = self._backward(decoder, len(batches), decoding, scores, advance, context)
            for number, (states, gradient) in enumerate(zip(encoded, context_gradients, strict=True)):
                encoding[len(encoder.blocks), number] = self._through_encoder_norm(states, gradient)
            self._backward(encoder, len(batches), encoding, scores, advance)
        ordered = [scores[position] for position in range(len(self._shape.layers))]
        return UnitScores(groups=tuple(g for g, _ in ordered), neurons=tuple(n for _, n in ordered))

    def transform_layers(self, tokens: torch.Tensor, visit: LayerVisit, *, micro_batch: int) -> None:
        """Run windows [N, T] through all blocks twice over, the encoder's first: the dense model, and what
        ``visit`` makes of it.
        """
        read, written = teacher_forced(tokens, start_token=self._start_token())
        encoder, decoder = self._stacks(written.shape[1])
        unread = [None] * len(micro_batches(read, micro_batch))
        with torch.no_grad():
            encoded = self._transform(encoder, micro_batches(read, micro_batch), visit, (unread, unread))
            dense, made = ([self._encoder_norm(states) for states in some] for some in encoded)
            self._transform(decoder, micro_batches(written, micro_batch), visit, (dense, made))

    def _transform(
        self,
        stack: _Stack,
        batches: Sequence[torch.Tensor],
        visit: LayerVisit,
        contexts: tuple[Sequence[torch.Tensor | None], Sequence[torch.Tensor | None]],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What leaves the last block of a stack, in the dense model and in what is made of it."""
        dense = made = [embedded(self._weights, self._shape, batch) for batch in batches]
        for index in range(len(stack.blocks)):
            with self._loaded(stack, index) as block:
                runs = (
                    [
                        partial(self._run, stack, index, block, self._away(states), encoded)
                        for states, encoded in zip(hidden, context, strict=True)
                    ]
                    for hidden, context in zip((dense, made), contexts, strict=True)
                )
                dense, made = visit(self._positions(stack, index), block, *runs)
        return dense, made

    def logits(self, encoder_tokens: torch.Tensor, decoder_tokens: torch.Tensor) -> torch.Tensor:
        """Logits [N, T, V] of decoder inputs [N, T] after encoder inputs, one block in memory at a time."""
        encoder, decoder = self._stacks(decoder_tokens.shape[1])
        encoded = self._last_states(encoder, encoder_tokens)
        decoded = self._last_states(decoder, decoder_tokens, [self._encoder_norm(encoded)])
        return self._final()(decoded) @ self._float32(head_name(self._shape)).T

    def next_tokens(self, windows: torch.Tensor) -> torch.Tensor:
        """What each position of the decoder is to predict [N, T - T // 2 + 1], for windows [N, T]; the last
        one has no next token, and what stands there means nothing.
        """
        return teacher_forced(windows, start_token=self._start_token())[1].roll(-1, dims=1)

    def last_states_of(
        self, views: Sequence[View], batches: Sequence[torch.Tensor], *, advance: Advance
    ) -> list[list[torch.Tensor]]:
        """What leaves the decoder's last block, for each of ``batches`` [n, T] of windows, under each of
        several masked views of the weights. Sliced ones will not do: a block's code knows its heads.
        """
        states = []
        for view in views:
            masked = StreamedEncoderDecoder(self._checkpoint, view(self._weights), self._shape, self._device)
            states.append(
                [
                    last
                    for _, alike in itertools.groupby(batches, key=lambda batch: batch.shape[1])
                    for last in masked._last_states_of_windows(list(alike))
                ]
            )
            advance(len(self._shape.layers))
        return states

    def output_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What turns states that left the last block [..., D] into logits [..., V]; loaded once."""
        final, head = self._final(), self._float32(head_name(self._shape))
        return lambda states: final(self._away(states)) @ head.T

    def _last_states_of_windows(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        halves = [teacher_forced(windows, start_token=self._start_token()) for windows in batches]
        read, written = [encoder for encoder, _ in halves], [decoder for _, decoder in halves]
        encoder, decoder = self._stacks(written[0].shape[1])
        with (
            self._borders(encoder, read, False, None, SILENT) as encoding,
            self._borders(decoder, written, False, None, SILENT) as decoding,
        ):
            self._forward(encoder, read, encoding)
            encoded = [encoding[len(encoder.blocks), number] for number in range(len(read))]
            context = [self._encoder_norm(states) for states in encoded]
            self._forward(decoder, written, decoding, context=context)
            return [decoding[len(decoder.blocks), number] for number in range(len(written))]

    def _last_states(
        self, stack: _Stack, tokens: torch.Tensor, context: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """What leaves the last block, [N, T, D], for tokens [N, T]."""
        with self._borders(stack, [tokens], False, None, SILENT) as borders:
            self._forward(stack, [tokens], borders, context=context)
            return borders[len(stack.blocks), 0]

    def _borders(
        self,
        stack: _Stack,
        batches: Sequence[torch.Tensor],
        spill: bool | None,
        folder: Path | None,
        progress: Progress,
    ) -> Borders:
        shapes = [(*batch.shape, self._shape.hidden_size) for batch in batches]
        return Borders(shapes, levels=len(stack.blocks) + 1, spill=spill, folder=folder, progress=progress)

    def _start_token(self) -> int:
        start = self._config.decoder_start_token_id
        return int(self._config.pad_token_id if start is None else start)

    def _stacks(self, decoder_length: int) -> tuple[_Stack, _Stack]:
        hidden_from = torch.full((decoder_length, decoder_length), torch.finfo(torch.float32).min)
        causal = self._away(hidden_from.triu(diagonal=1)[None, None])
        return (
            _Stack("encoder", self._model.encoder.block),
            _Stack("decoder", self._model.decoder.block, mask=causal),
        )

    def _forward(
        self,
        stack: _Stack,
        batches: Sequence[torch.Tensor],
        borders: Borders,
        advance: Advance = lambda steps: None,
        context: list[torch.Tensor] | None = None,
    ) -> None:
        """Run all blocks; ``borders`` gets what enters each of them and what leaves the last."""
        contexts: Sequence[torch.Tensor | None] = context or [None] * len(batches)
        for number, batch in enumerate(batches):
            borders[0, number] = embedded(self._weights, self._shape, batch)
        for index in range(len(stack.blocks)):
            with self._loaded(stack, index) as block, torch.no_grad():
                for number, encoded in enumerate(contexts):
                    states = self._away(borders[index, number])
                    borders[index + 1, number] = home(self._run(stack, index, block, states, encoded))
            advance(len(batches))

    def _run(
        self, stack: _Stack, index: int, block: nn.Module, hidden: torch.Tensor, context: torch.Tensor | None
    ) -> torch.Tensor:
        """One block over unpadded states [n, T, D]."""
        output, position_bias, _ = block(
            hidden,
            attention_mask=stack.mask,
            position_bias=stack.position_bias if index else None,
            encoder_hidden_states=context,
        )
        if index == 0:
            stack.position_bias = position_bias.detach()
        states: torch.Tensor = output
        return states

    def _backward(
        self,
        stack: _Stack,
        batches: int,
        borders: Borders,
        scores: Scores,
        advance: Advance,
        context: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Score all blocks from last to first, into ``scores``; returns the gradients of the context.

        The last level of ``borders`` holds the gradients of what left the stack; they replace the states of
        each level in turn.
        """
        leaves = [encoded.detach().requires_grad_() for encoded in context or []]
        for index in reversed(range(len(stack.blocks))):
            with self._loaded(stack, index) as block:
                for number in range(batches):
                    leaf = self._away(borders[index, number]).detach().requires_grad_()
                    output = self._run(stack, index, block, leaf, leaves[number] if leaves else None)
                    # gradients of the context add up in its leaf
                    torch.autograd.backward(output, self._away(borders[index + 1, number]))
                    assert leaf.grad is not None
                    borders[index, number] = home(leaf.grad)
                self._reduce(stack, index, block, scores)
            borders.forget(index + 1)
            advance(batches)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def _reduce(self, stack: _Stack, index: int, block: nn.Module, scores: Scores) -> None:
        """Sum ``|w * df/dw|`` over the units of every site that lies in the block."""
        prefix = self._prefix(stack, index)
        parameters = dict(block.named_parameters(prefix=prefix))
        for position in self._positions(stack, index):
            weighted = {}
            for name in scored_tensors(self._shape, position):
                weight, gradient = parameters[name].detach(), parameters[name].grad
                assert gradient is not None
                weighted[name] = gradient.mul_(weight).abs_()
            groups, neurons = unit_sums(self._shape, position, weighted)
            if not (np.isfinite(groups).all() and np.isfinite(neurons).all()):
                raise NirvanaError(
                    f"{self._shape.label(position)}: the gradients are NaN or infinite; "
                    "its units cannot be ranked."
                )
            scores[position] = groups, neurons

    def _encoder_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        encoder = self._shape.family.stack("encoder")
        norm, hidden = self._float32(f"{encoder.final_norm}.weight"), self._away(hidden)
        return nn.functional.rms_norm(hidden, norm.shape, norm, self._config.layer_norm_epsilon)

    def _through_encoder_norm(self, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        leaf = self._away(hidden).detach().requires_grad_()
        (passed_on,) = torch.autograd.grad(self._encoder_norm(leaf), leaf, gradient)
        return home(passed_on)

    def _final(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What lies between the last block and the head: the norm, and the scale of a tied head."""
        norm = self._float32(f"{self._shape.family.final_norm}.weight")
        scale = self._shape.hidden_size**-0.5 if self._config.scale_decoder_outputs else 1.0
        epsilon = self._config.layer_norm_epsilon
        return lambda states: nn.functional.rms_norm(states, norm.shape, norm, epsilon) * scale

    def _output_gradients(
        self, borders: Borders, level: int, batches: Sequence[torch.Tensor], output_gradient: OutputGradient
    ) -> None:
        """Replace the states of ``level``, which left the last block, by df/dstates."""
        final, head = self._final(), head_blocks(self._weights, self._shape, self._device)
        sequences = sum(len(batch) for batch in batches)
        for number, batch in enumerate(batches):
            gradient = states_gradient(
                self._away(borders[level, number]),
                self._away(batch),
                final=final,
                head=head,
                output_gradient=output_gradient,
            )
            borders[level, number] = home(gradient / sequences)

    def _prefix(self, stack: _Stack, index: int) -> str:
        return self._shape.family.site(stack.name).layer(index)

    def _positions(self, stack: _Stack, index: int) -> list[int]:
        """Those of ``shape.layers`` that lie in one block."""
        prefix = self._prefix(stack, index)
        return [
            position
            for position in range(len(self._shape.layers))
            if self._shape.place(position)[1] == prefix
        ]

    def _loaded(self, stack: _Stack, index: int) -> AbstractContextManager[nn.Module]:
        """One block with its weights."""
        prefix = self._prefix(stack, index)
        return loaded(stack.blocks[index], self._weights, prefix=prefix, device=self._device)

    def _away(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; itself when it is there."""
        return tensor.to(self._device)

    def _float32(self, name: str) -> torch.Tensor:
        return self._weights.load(name).to(self._device, torch.float32)
