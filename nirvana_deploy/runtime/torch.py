"""A checkpoint in transformers behind the interface of every runner: what the others are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from nirvana_deploy.export.dtypes import Dtype
from nirvana_deploy.model.checkpoint import load_checkpoint, norm_offset
from nirvana_deploy.model.config import context_tokens
from nirvana_deploy.model.reading import first_decoder_token
from nirvana_deploy.runtime.runner import checked_prompts, require_context, started


@dataclass(frozen=True)
class TorchState:
    """What was read so far. transformers changes the cache in place, so a state is continued once."""

    cache: Any
    attention_mask: NDArray[np.int64]
    """[N, S] of all tokens of a decoder, [N, E] of the prompts of an encoder-decoder."""
    encoded: Any = None
    """The encoder's states [N, E, D], as transformers hands them on."""


class TorchDecoder:
    """A decoder-only model of transformers, on the CPU."""

    runtime = "torch"
    start_token = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.vocab_size: int = model.config.vocab_size
        self.context_tokens = context_tokens(model.config)
        self.threads = torch.get_num_threads()

    def __enter__(self) -> TorchDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held beyond the model."""

    def prefill(
        self,
        tokens: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        answer: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], TorchState]:
        """Read prompts [N, T], then an answer [N, A]; returns logits [N, T + A, V] and the state."""
        tokens, mask = checked_prompts(
            tokens,
            attention_mask,
            answer,
            vocab_size=self.vocab_size,
            context_tokens=self.context_tokens,
        )
        return self._pass(tokens, mask, None)

    def decode(self, tokens: NDArray[np.int64], state: TorchState) -> tuple[NDArray[np.float32], TorchState]:
        """Read more tokens [N, T]; returns logits [N, T, V] and the next state."""
        mask = np.concatenate([state.attention_mask, np.ones_like(tokens)], axis=1)
        require_context(int(mask.sum(axis=1).max()), self.context_tokens)
        return self._pass(tokens, mask, state.cache)

    def _pass(
        self, tokens: NDArray[np.int64], mask: NDArray[np.int64], cache: Any
    ) -> tuple[NDArray[np.float32], TorchState]:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -tokens.shape[1] :]
        with torch.no_grad():
            output = self.model(
                torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions),
                past_key_values=cache,
                use_cache=True,
            )
        return output.logits.numpy(), TorchState(cache=output.past_key_values, attention_mask=mask)

    def in_float64(self) -> AbstractContextManager[None]:
        """Compute in float64 inside the block."""
        return _in_float64(self.model)

    def hidden_states(self, tokens: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """What each layer hands on for prompts [N, T], by its place ("layer 3"), in order."""
        layers = self.model.model.layers
        with _recorded({f"layer {index}": layer for index, layer in enumerate(layers)}) as found:
            self.prefill(tokens)
        return found


class TorchSeq2Seq:
    """An encoder-decoder of transformers, on the CPU."""

    runtime = "torch"
    start_token: int

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.vocab_size: int = model.config.vocab_size
        self.threads = torch.get_num_threads()
        self.start_token = first_decoder_token(model.config.to_dict())

    def __enter__(self) -> TorchSeq2Seq:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held beyond the model."""

    def encoder_states(
        self, tokens: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Prompts [N, E] to the encoder's states [N, E, D]."""
        states: NDArray[np.float32] = self._encode(tokens, attention_mask).encoded.last_hidden_state.numpy()
        return states

    def prefill(
        self,
        tokens: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        answer: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], TorchState]:
        """Read prompts [N, E], the start token and an answer [N, A]; returns logits [N, A + 1, V], state."""
        state = self._encode(tokens, attention_mask)
        return self.decode(started(self.start_token, len(tokens), answer), state)

    def decode(self, tokens: NDArray[np.int64], state: TorchState) -> tuple[NDArray[np.float32], TorchState]:
        """Read more decoder tokens [N, T]; returns logits [N, T, V] and the next state."""
        with torch.no_grad():
            output = self.model(
                encoder_outputs=state.encoded,
                attention_mask=torch.from_numpy(state.attention_mask),
                decoder_input_ids=torch.from_numpy(tokens),
                past_key_values=state.cache,
                use_cache=True,
            )
        after = TorchState(output.past_key_values, state.attention_mask, state.encoded)
        return output.logits.numpy(), after

    def _encode(self, tokens: NDArray[np.int64], attention_mask: NDArray[np.int64] | None) -> TorchState:
        tokens, mask = checked_prompts(tokens, attention_mask, vocab_size=self.vocab_size)
        with torch.no_grad():
            output = self.model.encoder(
                input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)
            )
        encoded = BaseModelOutput(last_hidden_state=output.last_hidden_state)
        return TorchState(cache=None, attention_mask=mask, encoded=encoded)

    def in_float64(self) -> AbstractContextManager[None]:
        """Compute in float64 inside the block."""
        return _in_float64(self.model)

    def hidden_states(self, tokens: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """What each layer hands on where encoder and decoder read [N, T], by its place, in order."""
        encoder, decoder = self.model.encoder, self.model.decoder
        places = {f"encoder layer {index}": block for index, block in enumerate(encoder.block)}
        places["final norm of the encoder"] = encoder.final_layer_norm
        places |= {f"decoder layer {index}": block for index, block in enumerate(decoder.block)}
        with _recorded(places) as found:
            self.decode(tokens, self._encode(tokens, None))
        return found


def open_checkpoint(
    path: Path, *, runtime: str = "torch", threads: int | None = None, rounded_to: Dtype | None = None
) -> TorchDecoder | TorchSeq2Seq:
    """Load a checkpoint folder in float32.

    ``rounded_to``, a half-precision type, first rounds to it what an exported graph stores in it or casts to
    it. ``threads`` sets the size of torch's pool in this process. Raises NirvanaError for a folder that is no
    checkpoint.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_checkpoint(path)
    kind = TorchSeq2Seq if model.config.is_encoder_decoder else TorchDecoder
    if rounded_to is not None and rounded_to.half_precision:
        _round(model, rounded_to)
    return kind(model)


def _round(model: PreTrainedModel, dtype: Dtype) -> None:
    """Round the weights of ``model`` in place, and from now on the rotary angles."""
    wide: tuple[str, ...] = ()
    if model.config.is_encoder_decoder:
        wide = ("layer_norm", "wo.weight") if dtype.name == "fp16" else ("layer_norm",)
    else:
        model.model.rotary_emb.register_forward_hook(
            lambda _module, _inputs, angles: tuple(angle.to(dtype.torch).float() for angle in angles)
        )
    offset = norm_offset(model.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(part in name for part in wide):
                added = offset if "norm" in name else 0.0  # stored is what is multiplied with
                parameter.data = (parameter + added).to(dtype.torch).float() - added
        _round_factors(model, dtype)


def _round_factors(model: PreTrainedModel, dtype: Dtype) -> None:
    """Round the numbers that embeddings and what is added to hidden states are multiplied with."""
    for module in model.modules():
        if isinstance(scale := getattr(module, "embed_scale", None), torch.Tensor):
            scale.copy_(scale.to(dtype.torch).float())
        for name in ("residual_multiplier", "embedding_multiplier"):
            if (factor := getattr(module, name, None)) is not None:
                setattr(module, name, float(torch.tensor(factor, dtype=dtype.torch)))


@contextmanager
def _in_float64(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block ``model`` computes in float64; afterwards it is as it was, bit for bit."""
    model.double()
    try:
        yield
    finally:
        model.float()


@contextmanager
def _recorded(modules: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Collect what ``modules`` return, by their names, in the order in which they run."""
    outputs: dict[str, NDArray[np.float32]] = {}

    def keep(name: str, output: Any) -> None:
        outputs[name] = (output[0] if isinstance(output, tuple) else output).numpy()

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, module in modules.items()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
