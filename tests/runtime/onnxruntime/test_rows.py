"""Sequences that join and leave a batch go on as if each had been alone, in every flavor of the graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from builders.tiny import VOCABULARY, write_tiny

from nirvana_deploy.export.decoder import FLAVORS
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.onnxruntime.rows import joined_caches, joined_masks, unpadded
from nirvana_deploy.runtime.runner import Batches

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(3, VOCABULARY, size=(1, length)) for length in (3, 17, 8)]


@pytest.fixture(scope="module", params=FLAVORS)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrtDecoder]:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_tiny(folder / "tiny", "llama-tied", head_dim=16)
    cache = {"cache_tokens": 64} if request.param == "static-cache" else {}
    onnx = onnx_from_checkpoint(
        Checkpoint.open(checkpoint), folder / "onnx", flavor=request.param, **cache
    ).path
    with OrtDecoder(onnx, threads=1, headroom_tokens=2) as opened:
        yield opened


def test_logits_in_a_changing_batch_are_those_alone(runner: OrtDecoder) -> None:
    assert isinstance(runner, Batches)
    fed = np.random.default_rng(9).integers(3, VOCABULARY, size=(3, 12, 1, 1))
    alone = []
    for prompt, tokens in zip(PROMPTS, fed, strict=True):
        logits, state = runner.prefill(prompt)
        steps = []
        for token in tokens:
            logits, state = runner.decode(token, state)
            steps.append(logits[0, -1].copy())
        alone.append(steps)

    rows, state = [0], runner.prefill(PROMPTS[0])[1]
    step = dict.fromkeys(range(3), 0)
    changes = {2: ("join", 1), 4: ("join", 2), 6: ("leave", 1), 8: ("join", 1), 10: ("leave", 0)}
    for now in range(12):
        kind, row = changes.get(now, ("", 0))
        if kind == "join":
            state = runner.joined(state, runner.prefill(PROMPTS[row])[1])
            rows.append(row)
            step[row] = 0
        elif kind == "leave":
            kept = [place for place, one in enumerate(rows) if one != row]
            state, rows = runner.kept(state, kept), [rows[place] for place in kept]
        logits, state = runner.decode(np.concatenate([fed[row, step[row]] for row in rows]), state)
        for place, row in enumerate(rows):
            np.testing.assert_allclose(logits[place, -1], alone[row][step[row]], rtol=2e-4, atol=2e-4)
            step[row] += 1
    assert rows == [2, 1]


@pytest.mark.parametrize("runner", ["gqa", "static-cache"], indirect=True)
def test_states_change_again_before_they_are_on_the_device(
    runner: OrtDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = np.array([[5]])
    _, state = runner.decode(token, runner.prefill(PROMPTS[1])[1])
    alone = runner.decode(token, state)[0].copy()
    _, state = runner.decode(token, runner.prefill(PROMPTS[1])[1])
    others = [runner.prefill(prompt)[1] for prompt in PROMPTS]
    with monkeypatch.context() as patched:
        patched.setattr(runner, "_device", "cuda")  # whose buffers are copied there by the next step
        for other in others:
            state = runner.joined(state, other)
        state = runner.kept(runner.kept(state, [0, 2, 3]), [2, 0])
        state = runner.joined(runner.kept(state, [1]), others[0])
        assert state.slots is not None
        if runner.max_tokens is None:
            grown = runner._grown(state.slots, state.slots.slots + 1)
            for array, before in zip(grown.arrays, state.slots.arrays, strict=True):
                np.testing.assert_array_equal(array[:, :, : before.shape[2]], before)
    logits, _ = runner.decode(np.repeat(token, 2, axis=0), state)
    np.testing.assert_allclose(logits[:1], alone, rtol=2e-4, atol=2e-4)


def test_masks_are_padded_on_the_left_and_caches_where_they_begin() -> None:
    masks = [np.array([[1, 1]]), np.array([[0, 1, 1, 1]])]
    assert joined_masks(masks).tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert unpadded(joined_masks(masks)) == 1
    parts = [np.full((1, 1, 2, 1), 5.0), np.full((1, 1, 4, 1), 7.0)]
    assert joined_caches(parts, in_place=False)[0, 0, :, 0].tolist() == [0, 0, 5, 5]
    assert joined_caches(parts, in_place=True)[0, 0, :, 0].tolist() == [5, 5, 0, 0]
