"""The measured KL of one cut is that of a transformers model with that layer's weights replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from builders.plans import shape_of
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from numpy.typing import NDArray

from nirvana_deploy.model.checkpoint import Checkpoint, load_checkpoint
from nirvana_deploy.model.reading import teacher_forced
from nirvana_deploy.model.shape import LayerShape, ModelShape
from nirvana_deploy.prune.curves.curve import curve_of
from nirvana_deploy.prune.curves.measured import Trial, measure, scaled_by
from nirvana_deploy.prune.streaming.model import StreamedModel

WRITERS: dict[str, Callable[[Path], Path]] = {
    "llama": partial(write_tiny, kind="llama-biased"),
    "qwen3": partial(write_tiny, kind="qwen3"),
    "gemma3": partial(write_tiny, kind="gemma3"),
    "t5": partial(write_t5, kind="t5"),
    "flan-t5": partial(write_t5, kind="flan-t5"),
}


def log_probabilities(model: Any, tokens: NDArray[np.int64]) -> torch.Tensor:
    inputs = {"input_ids": torch.from_numpy(tokens)}
    if model.config.is_encoder_decoder:
        read, written = map(torch.from_numpy, teacher_forced(tokens, start_token=0))
        inputs = {"input_ids": read, "decoder_input_ids": written}
    with torch.no_grad():
        return torch.log_softmax(model(**inputs).logits.double(), -1)


def reader_names(shape: ModelShape) -> Iterator[tuple[int, str, int | None]]:
    """(position in ``shape.layers``, name of the weight, KV groups or None) of every o and down."""
    for position, layer in enumerate(shape.layers):
        site, prefix = shape.place(position)
        yield position, f"{prefix}.{site.o}.weight", layer.kv_heads
        if site.ffn_rows:
            yield position, f"{prefix}.{site.ffn_down}.weight", None


@pytest.mark.parametrize("kind", WRITERS)
def test_the_kl_of_a_trial_is_that_of_the_model_with_other_weights(
    kind: str, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    folder, windows = WRITERS[kind](tmp_path), tokens[:3]
    shape, model = shape_of(folder), load_checkpoint(folder)
    generator = torch.Generator().manual_seed(0)
    dense, trials, expected = log_probabilities(model, windows), [], []
    for number, (position, name, groups) in reversed(list(enumerate(reader_names(shape)))):
        linear = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(linear, torch.nn.Linear)
        for removed in (1, 2)[: 1 + number % 2]:
            weight = linear.weight.data.clone()
            other = weight + 0.1 * removed * torch.randn(weight.shape, generator=generator)
            read: list[torch.Tensor] = []
            hook = linear.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
            log_probabilities(model, windows)
            hook.remove()
            trials.append(Trial(position, groups is not None, removed, read[0] @ (other - weight).T))
            linear.weight.data = other
            changed = log_probabilities(model, windows)
            linear.weight.data = weight
            expected.append(float((dense.exp() * (dense - changed)).sum(-1).mean()))
    measure(StreamedModel(Checkpoint.open(folder)), trials, torch.from_numpy(windows))
    found = [trial.kl for trial in trials]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert min(expected) > 1e-4 and len(set(expected)) == len(expected)


def trial(removed: int, kl: float, *, attention: bool, position: int = 0) -> Trial:
    return Trial(position, attention, removed, torch.zeros(1), kl)


def sited(sites: list[str]) -> ModelShape:
    """As many layers, of which only the sites matter here."""
    layers = tuple(LayerShape(query_heads=4, kv_heads=4, ffn_width=20, site=site) for site in sites)
    return cast(ModelShape, SimpleNamespace(layers=layers))


def test_a_curve_is_multiplied_by_the_mean_ratio_within_bounds() -> None:
    curve = curve_of([0, 10, 20], [0, 1, 4])
    found = scaled_by(
        sited(["a", "b", "c", "d"]),  # no neighbours
        [curve, curve, curve, curve],
        [
            trial(10, 2, attention=False),
            trial(15, 20, attention=False),  # predicted 2.5: between the points
            trial(10, 0, attention=False, position=1),
            trial(10, 1e9, attention=False, position=2),
            trial(0, 1, attention=False, position=3),
            trial(10, 7, attention=True),
        ],
        attention=False,
    )
    assert found[0].kl.tolist() == pytest.approx([0, 4, 16])  # sqrt(2 * 8)
    assert found[1].kl.tolist() == pytest.approx([0, 0.2, 0.8])
    assert found[2].kl.tolist() == pytest.approx([0, 20, 80])
    assert found[3].kl.tolist() == [0, 1, 4]
    assert curve.kl.tolist() == [0, 1, 4]


def test_a_third_of_a_ratio_is_that_of_the_two_neighbours_on_each_side_of_the_same_site() -> None:
    curve = curve_of([0, 1], [0, 1])
    ratios = [1.0, 2.0, 8.0, 4.0]
    trials = [trial(1, ratio, attention=True, position=layer) for layer, ratio in enumerate(ratios)]
    found = scaled_by(sited(["a", "a", "a", "b"]), [curve] * 4, trials, attention=True)
    assert found[1].kl[1] == pytest.approx(2 ** (2 / 3) * (1 * 8) ** (1 / 6))
    assert found[2].kl[1] == pytest.approx(8 ** (2 / 3) * (1 * 2) ** (1 / 6))
    assert found[3].kl[1] == pytest.approx(4)
