"""Where an exported graph first departs from its checkpoint, going down the layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.export.decoder import hidden_state_name
from nirvana_deploy.output.layout import is_seq2seq
from nirvana_deploy.runtime.onnxruntime.decoder import session_outputs
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import decoder_values, encoder_values
from nirvana_deploy.runtime.torch import TorchDecoder, TorchSeq2Seq

Array = NDArray[np.float32]


def first_departure(
    reference: TorchDecoder | TorchSeq2Seq, folder: Path, tokens: NDArray[np.int64], *, tolerance: float
) -> str:
    """The first place where hidden states of ``tokens`` [N, T] differ by more than ``tolerance``.

    It is "layer 3", "encoder layer 3" or the like, and "final norm or head" where all layers agree.
    """
    for place, found, wanted in _pairs(reference, folder, tokens):
        if not np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max():
            return place
    return "final norm or head"


def _pairs(
    reference: TorchDecoder | TorchSeq2Seq, folder: Path, tokens: NDArray[np.int64]
) -> Iterator[tuple[str, Array, Array]]:
    """Place, what the graph computes there, what the checkpoint computes there."""
    wanted = reference.hidden_states(tokens)
    names = {place: hidden_state_name(int(place.split()[-1])) for place in wanted if place[-1].isdigit()}
    if not is_seq2seq(folder):
        found = session_outputs(folder, tokens, list(names.values()))
        yield from ((place, found[name], wanted[place]) for place, name in names.items())
        return
    # the decoder is given the checkpoint's own encoder states, so that what departs there began there
    assert isinstance(reference, TorchSeq2Seq)
    encoder = {place: name for place, name in names.items() if place.startswith("encoder")}
    encoder |= {place: "last_hidden_state" for place in wanted if place not in names}
    decoder = {place: name for place, name in names.items() if place.startswith("decoder")}
    in_encoder = encoder_values(folder, tokens, list(encoder.values()))
    in_decoder = decoder_values(folder, reference.encoder_states(tokens), tokens, list(decoder.values()))
    yield from ((place, in_encoder[name], wanted[place]) for place, name in encoder.items())
    yield from ((place, in_decoder[name], wanted[place]) for place, name in decoder.items())
