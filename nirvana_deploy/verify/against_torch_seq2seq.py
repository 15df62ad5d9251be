"""Prove an encoder-decoder's ONNX folder against its checkpoint: the twin of ``verify.py`` for T5.

The encoder's states and the decoder's logits are compared at lengths, paddings and pasts that the export
knew nothing of; greedy answers are compared token by token. When something differs, hidden states are
compared from the encoder's first layer to the decoder's last, and the first one that departs is named.

Half precision is proved as ``verify.py`` does it: the graph in float32 against the checkpoint with the same
numbers rounded, then the file as it is within what rounding explains. Narrow failures in float32 are judged
in float64, as a decoder's are (``logits.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.export.decoder import hidden_state_name
from nirvana_deploy.export.dtypes import Dtype
from nirvana_deploy.model.checkpoint import load_checkpoint, stop_token_ids
from nirvana_deploy.output.layout import DECODER_FILE
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import OrtSeq2Seq, decoder_values, encoder_values
from nirvana_deploy.runtime.onnxruntime.session import as_numpy
from nirvana_deploy.verify.against_torch import GreedyCheck, VerifyReport, dtype_of_graph, prompts_for
from nirvana_deploy.verify.folder_check import check_folder
from nirvana_deploy.verify.tolerance import (
    RELATIVE_TOLERANCE,
    LogitsCheck,
    in_float64,
    judged,
    relative_tolerance,
)

NO_GENAI = "onnxruntime-genai 0.18 runs no T5: Whisper and Marian are its only encoder-decoders"


def verify_seq2seq(
    checkpoint: Path,
    folder: Path,
    *,
    new_tokens: int = 32,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Compare the encoder-decoder in ``folder`` with its ``checkpoint``; see ``verify_onnx``."""
    with progress.task(f"Verifying {folder.name}", 3) as advance:
        check_folder(folder, checkpoint)
        dtype = dtype_of_graph(folder / DECODER_FILE)
        torch_model = _TorchModel(_reference(checkpoint, dtype))
        model = OrtSeq2Seq(folder, threads=threads, in_float32=dtype.half_precision)
        if model.vocab_size != torch_model.model.config.vocab_size:
            raise NirvanaError(
                f"{folder} has a vocabulary of {model.vocab_size}, "
                f"its checkpoint {torch_model.model.config.vocab_size}."
            )
        advance(1)
        checks = _checks(torch_model, model, RELATIVE_TOLERANCE)
        tolerance, runs_as_it_is = RELATIVE_TOLERANCE, dtype.name != "bf16"
        if dtype.half_precision:
            checks = tuple(replace(check, name=f"in float32: {check.name}") for check in checks)
        if dtype.half_precision and runs_as_it_is:
            tolerance = relative_tolerance(dtype, layers=torch_model.layers)
            model = OrtSeq2Seq(folder, threads=threads)
            checks += _checks(torch_model, model, tolerance)
        advance(1)
        prompts = prompts_for(checkpoint, model.vocab_size)
        greedy = (
            _greedy_check(
                torch_model,
                model,
                prompts,
                new_tokens=new_tokens,
                runtime="onnxruntime" if runs_as_it_is else "onnxruntime (in float32)",
                tolerance=tolerance,
            ),
            GreedyCheck("onnxruntime-genai", 0, new_tokens, 0, 0, passed=True, not_run=NO_GENAI),
        )
        advance(1)
    report = VerifyReport(checks=checks, greedy=greedy, first_departure=None)
    if report.passed:
        return report
    return replace(report, first_departure=_first_departure(torch_model, folder, prompts[-1]))


def _reference(checkpoint: Path, dtype: Dtype) -> PreTrainedModel:
    """The checkpoint in float32, after rounding to ``dtype`` the weights that the graph stores in it."""
    model = load_checkpoint(checkpoint)
    if not dtype.half_precision:
        return model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kept = name.endswith("wo.weight") and dtype.name == "fp16"
            if "layer_norm" not in name and not kept:
                parameter.copy_(parameter.to(dtype.torch))
    return model


@dataclass(frozen=True)
class _TorchModel:
    """The checkpoint in transformers, asked in numpy."""

    model: PreTrainedModel

    @property
    def layers(self) -> int:
        """Attentions, each with what lies around it."""
        return len(self.model.encoder.block) + 2 * len(self.model.decoder.block)

    def encoder_states(
        self, tokens: NDArray[np.int64], mask: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """[N, E, D] of prompts [N, E]."""
        attended = torch.ones(tokens.shape) if mask is None else torch.from_numpy(mask)
        with torch.no_grad():
            output = self.model.encoder(input_ids=torch.from_numpy(tokens), attention_mask=attended)
        states: NDArray[np.float32] = output.last_hidden_state.numpy()
        return states

    def logits(
        self,
        tokens: NDArray[np.int64],
        decoder_tokens: NDArray[np.int64],
        mask: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """[N, T, V] of decoder tokens [N, T] after prompts [N, E], without a cache."""
        attended = torch.ones(tokens.shape) if mask is None else torch.from_numpy(mask)
        with torch.no_grad():
            output = self.model(
                input_ids=torch.from_numpy(tokens),
                attention_mask=attended,
                decoder_input_ids=torch.from_numpy(decoder_tokens),
                use_cache=False,
            )
        logits: NDArray[np.float32] = output.logits.numpy()
        return logits

    def exactly(
        self, compute: Callable[..., NDArray[np.float32]], *given: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """What ``compute``, one of the two above, says in float64."""
        with in_float64(self.model):
            return compute(*given)

    def answer(self, prompt: NDArray[np.int64], start: int, new_tokens: int) -> list[int]:
        """Greedy answer to a prompt [1, E], up to the first stop token, which is left out."""
        stops, cache, new_ids = stop_token_ids(self.model.config), None, []
        encoded = BaseModelOutput(last_hidden_state=torch.from_numpy(self.encoder_states(prompt)))
        token = torch.tensor([[start]])
        with torch.no_grad():
            for _ in range(new_tokens):
                output: Any = self.model(
                    encoder_outputs=encoded, decoder_input_ids=token, past_key_values=cache, use_cache=True
                )
                cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
                if int(token) in stops:
                    break
                new_ids.append(int(token))
        return new_ids


def _checks(torch_model: _TorchModel, model: OrtSeq2Seq, tolerance: float) -> tuple[LogitsCheck, ...]:
    """Both halves; differences may be ``tolerance`` of the largest number compared."""
    return (*_encoder_checks(torch_model, model, tolerance), *_decoder_checks(torch_model, model, tolerance))


def _encoder_checks(torch_model: _TorchModel, model: OrtSeq2Seq, tolerance: float) -> Iterator[LogitsCheck]:
    """The encoder's states at odd lengths and in a batch padded on both sides."""
    generator = np.random.default_rng(11)
    for sequences, length in ((1, 1), (1, 7), (2, 45)):
        tokens = generator.integers(0, model.vocab_size, size=(sequences, length))
        found = as_numpy(model.encode(tokens).encoder_states)
        expected = torch_model.encoder_states(tokens)
        exact = partial(torch_model.exactly, torch_model.encoder_states, tokens)
        yield judged(f"encoder {sequences} x {length}", found, expected, exact, None, tolerance)
    mask = _both_sides()
    tokens = generator.integers(0, model.vocab_size, size=mask.shape)
    found = as_numpy(model.encode(tokens, mask).encoder_states)
    expected = torch_model.encoder_states(tokens, mask)
    exact = partial(torch_model.exactly, torch_model.encoder_states, tokens, mask)
    yield judged("encoder 3 x 19, padded", found, expected, exact, mask, tolerance)


def _decoder_checks(torch_model: _TorchModel, model: OrtSeq2Seq, tolerance: float) -> Iterator[LogitsCheck]:
    """Logits of a whole answer at once, and step by step with caches, prompts padded and not."""
    generator = np.random.default_rng(12)
    for mask, at_once in ((np.ones((1, 5), dtype=np.int64), 61), (_both_sides(), 1), (_both_sides(), 13)):
        tokens = generator.integers(0, model.vocab_size, size=mask.shape)
        answer = generator.integers(0, model.vocab_size, size=(len(mask), max(at_once, 19)))
        answer[:, 0] = model.start_token
        state, parts = model.encode(tokens, mask), []
        cuts = [0, at_once, *range(at_once + 1, answer.shape[1] + 1)]
        for start, end in pairwise(cuts):
            logits, state = model.decode(answer[:, start:end], state)
            parts.append(logits)
        padded = "" if mask.all() else ", prompts padded"
        name = f"decoder {len(mask)} x {at_once} after {mask.shape[1]} tokens{padded}"
        steps = answer.shape[1] - at_once
        yield judged(
            f"{name}, then {steps} decode steps" if steps else name,
            np.concatenate(parts, axis=1),
            torch_model.logits(tokens, answer, mask),
            partial(torch_model.exactly, torch_model.logits, tokens, answer, mask),
            None,
            tolerance,
        )


def _both_sides() -> NDArray[np.int64]:
    """The mask of three prompts: one padded on the left, one on the right, one whole."""
    mask = np.ones((3, 19), dtype=np.int64)
    mask[0, :8], mask[1, -11:] = 0, 0
    return mask


def _greedy_check(
    torch_model: _TorchModel,
    model: OrtSeq2Seq,
    prompts: Sequence[NDArray[np.int64]],
    *,
    new_tokens: int,
    runtime: str,
    tolerance: float,
) -> GreedyCheck:
    """Greedy answers of both, prompt by prompt."""
    stops = stop_token_ids(torch_model.model.config)
    equal = ties = 0
    for prompt in prompts:
        wanted = torch_model.answer(prompt, model.start_token, new_tokens)
        found = model.generate(prompt, max_new_tokens=new_tokens, eos_token_ids=stops)
        found = found[:-1] if found[-1] in stops else found
        if found == wanted:
            equal += 1
        else:
            ties += _parted_at_a_tie(torch_model, model.start_token, prompt, wanted, found, tolerance)
    return GreedyCheck(
        runtime=runtime,
        prompts=len(prompts),
        new_tokens=new_tokens,
        equal_prompts=equal,
        ties=ties,
        passed=equal + ties == len(prompts),
    )


def _parted_at_a_tie(
    torch_model: _TorchModel,
    start: int,
    prompt: NDArray[np.int64],
    wanted: list[int],
    found: list[int],
    tolerance: float,
) -> bool:
    """Whether the answers part where torch itself sees both tokens as equally likely."""
    at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), None)
    if at is None:
        return False  # one is shorter: no tie explains that
    last = torch_model.logits(prompt, np.array([[start, *wanted[:at]]], dtype=np.int64))[0, -1]
    return bool(abs(last[wanted[at]] - last[found[at]]) <= tolerance * np.abs(last).max())


def _first_departure(torch_model: _TorchModel, folder: Path, tokens: NDArray[np.int64]) -> str:
    """Where hidden states first differ by more than the tolerance, from the encoder's first layer on."""
    model = torch_model.model
    # the decoder is given torch's own encoder states, so that what departs there began there
    given = torch_model.encoder_states(tokens)
    encoder_names = [hidden_state_name(index) for index in range(len(model.encoder.block))]
    decoder_names = [hidden_state_name(index) for index in range(len(model.decoder.block))]
    in_encoder = encoder_values(folder, tokens, [*encoder_names, "last_hidden_state"])
    in_decoder = decoder_values(folder, given, tokens, decoder_names)
    expected: list[NDArray[np.float32]] = []
    blocks = [*model.encoder.block, model.encoder.final_layer_norm, *model.decoder.block]
    hooks = [
        block.register_forward_hook(
            lambda _module, _inputs, output: expected.append(
                (output[0] if isinstance(output, tuple) else output).numpy()
            )
        )
        for block in blocks
    ]
    try:
        torch_model.logits(tokens, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    places = [f"encoder layer {index}" for index in range(len(encoder_names))]
    places += ["final norm of the encoder"]
    places += [f"decoder layer {index}" for index in range(len(decoder_names))]
    for place, found, wanted in zip(
        places, [*in_encoder.values(), *in_decoder.values()], expected, strict=True
    ):
        if not np.abs(found - wanted).max() <= RELATIVE_TOLERANCE * np.abs(wanted).max():
            return place
    return "final norm or head"
