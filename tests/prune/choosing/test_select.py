"""The KL selector: masked equals sliced, the better candidate wins, the same inputs give the same bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.plans import plan_for
from builders.tiny import VOCABULARY, write_tiny
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.windows import TokenWindows, calibration_candidates, calibration_data
from nirvana_deploy.measure.quality import window_scores
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.choosing.candidates import Everywhere, candidates_of, pieces_of
from nirvana_deploy.prune.choosing.select import Selection, gamma_grid, select_cut
from nirvana_deploy.prune.cutting import Cutter
from nirvana_deploy.prune.divergence import masked_divergences, masked_quality
from nirvana_deploy.prune.plan import default_gamma, make_plan
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.prune.streaming.score import score_units
from nirvana_deploy.search.recipe import Where
from nirvana_deploy.search.workers import run_points


def windows(seed: int, *, count: int = 4, length: int = 12, source: str = "noise") -> TokenWindows:
    """Random windows; each seed is a text of its own."""
    tokens = np.random.default_rng(seed).integers(3, VOCABULARY, size=(count, length))
    positions = tuple(range(0, count * length, length))
    return TokenWindows(tokens, source=source, text_sha256=f"sha-{seed}", seed=seed, positions=positions)


def logits_of(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = load_checkpoint(folder)(torch.from_numpy(tokens)).logits.numpy()
    return logits


def test_masked_kl_equals_that_of_the_sliced_checkpoint(
    tiny: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    plans = [plan_for(tiny, seed=1), plan_for(tiny, seed=2, allocation="uniform")]
    [found, _] = masked_quality(Checkpoint.open(tiny), plans, [tokens, tokens[:2, :7]])
    assert found.divergence.shape == found.loss.shape == (2, len(tokens))
    dense = logits_of(tiny, tokens)
    for index, plan in enumerate(plans):
        slice_checkpoint(Checkpoint.open(tiny), plan, tmp_path / str(index))
        sliced = logits_of(tmp_path / str(index), tokens)
        for window, row in enumerate(tokens):
            expected = window_scores({"p": dense[window], "q": sliced[window]}, row)["q"].kl.mean()
            assert found.divergence[index, window] == pytest.approx(expected, rel=1e-3, abs=1e-6)
            for model, loss in ((dense, found.dense_loss[window]), (sliced, found.loss[index, window])):
                scores = window_scores({"of": model[window, :-1]}, row[1:])["of"]
                assert loss == pytest.approx(scores.negative_log_likelihood.mean(), rel=1e-4)


def test_more_plans_than_fit_at_once_are_walked_in_turns(tiny_llama: Path, tokens: NDArray[np.int64]) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    plans = [plan_for(tiny_llama, seed=seed) for seed in range(3)]
    [in_turns] = masked_quality(checkpoint, plans, [tokens], states_bytes=1)
    np.testing.assert_array_equal(in_turns.divergence, masked_divergences(checkpoint, plans, tokens))


def selected(
    folder: Path,
    calibrations: Sequence[TokenWindows],
    heldout: Sequence[TokenWindows],
    *,
    sparsity: float = 0.3,
    saliencies: Sequence[str] = ("nirvana",),
    gammas: Sequence[float | None] = (1.0,),
    everywhere: Everywhere | None = None,
) -> Selection:
    """Of plain cuts."""
    plain = Pruning(sparsity=sparsity, allocation="global", round_to=4, reconstruct=False)
    return select_cut(
        Cutter(Checkpoint.open(folder), plain, seed=0),
        calibrations,
        heldout,
        saliencies=saliencies,
        gammas=gammas,
        scratch=Path("nothing is refitted"),
        everywhere=everywhere,
    )


def write_with_idle_units(folder: Path) -> Path:
    """A model of which the upper half of every FFN, and one KV group a layer, has no effect."""
    write_tiny(folder, "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("down_proj.weight"):
            tensor[:, 20:] = 0
        if name.endswith("o_proj.weight"):
            tensor[:, :16] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_planted_better_candidate_wins(tmp_path: Path) -> None:
    folder = write_with_idle_units(tmp_path)
    selection = selected(
        folder, [windows(1), windows(2)], [windows(9, count=6)], saliencies=("random", "taylor")
    )
    assert [c.saliency for c in selection.candidates] == ["random", "taylor", "taylor"]
    best, worst = selection.candidates[selection.winner], selection.candidates[0]
    assert best.saliency == "taylor" and best.kl < 0.01 < worst.kl
    assert best.behind == 0 and worst.behind == pytest.approx(worst.kl - best.kl)
    assert worst.behind > 2 * (worst.behind_standard_error or 0)
    assert selection.plan.saliency == "taylor" and selection.calibration is not None
    assert (worst.source, worst.text_sha256) == (None, None)


@pytest.mark.integration
def test_candidates_made_in_other_processes_are_the_same(tiny_llama: Path) -> None:
    tried = {"saliencies": ("taylor", "random", "wanda-sp"), "gammas": (1.0, None)}
    sets = [windows(1), windows(2)], [windows(9, count=5)]
    here = selected(tiny_llama, *sets, **tried)
    there = selected(tiny_llama, *sets, **tried, everywhere=partial(run_points, where=Where(processes=2)))
    assert there.to_json() == here.to_json() and len(here.candidates) == 10
    assert there.plan == here.plan and there.calibration is not None and here.calibration is not None
    assert np.array_equal(there.calibration.tokens, here.calibration.tokens)


def test_result_is_complete_and_the_same_every_time(tiny_llama: Path) -> None:
    def select() -> str:
        selection = selected(
            tiny_llama,
            [windows(1), windows(2)],
            [windows(9, count=5), windows(8, count=3)],
            gammas=(1.0, None),
        )
        return json.dumps(selection.to_json() | {"plan": selection.plan.kept_neurons})

    first = select()
    assert select() == first
    data = json.loads(first)
    kls = [candidate["kl"] for candidate in data["candidates"]]
    assert len(kls) == 4 and data["winner"] == int(np.argmin(kls))
    assert data["runner_up"] == int(np.argsort(kls)[1])
    assert data["kl"] == {"min": min(kls), "median": float(np.median(kls)), "max": max(kls)}
    assert data["heldout"]["windows"] == 8 and data["heldout"]["tokens"] == 96


def test_paired_standard_errors_are_those_of_the_differences(tiny_llama: Path) -> None:
    selection = selected(tiny_llama, [windows(1), windows(2)], [windows(9)])
    plans = [
        make_plan(
            shape_from_config(config_json(tiny_llama)),
            score_units(Checkpoint.open(tiny_llama), windows(seed).tokens),
            sparsity=0.3,
            gamma=1.0,
            round_to=4,
            saliency="nirvana",
        )
        for seed in (1, 2)
    ]
    kl = masked_divergences(Checkpoint.open(tiny_llama), plans, windows(9).tokens)
    other = 1 - selection.winner
    difference = kl[other] - kl[selection.winner]
    candidate = selection.candidates[other]
    assert candidate.behind == pytest.approx(difference.mean(), rel=1e-9)
    assert candidate.behind_standard_error == pytest.approx(difference.std(ddof=1) / 2, rel=1e-9)
    assert selection.separable == (difference.mean() > difference.std(ddof=1))
    assert selection.verdict.startswith(f"Winner: {selection.candidates[selection.winner].name}")


def test_one_window_and_one_candidate_know_no_error(tiny_llama: Path) -> None:
    selection = selected(tiny_llama, [windows(1)], [windows(9, count=1)])
    assert selection.candidates[0].kl_standard_error is None
    assert selection.runner_up is None and not selection.separable
    assert selection.verdict.startswith("Only candidate")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"gammas": (30.0,), "sparsity": 0.8}, "largest feasible for gamma 30"),
        ({"saliencies": ("nirvanna",)}, "Did you mean 'nirvana'"),
        ({"saliencies": ()}, "Nothing to choose from"),
        ({"heldout": [windows(9), windows(8, length=13)]}, r"one length, got lengths \[12, 13\]"),
        ({"heldout": []}, "one length"),
        ({"heldout": [windows(1, count=2)]}, "also calibration text"),
        ({"heldout": [replace(windows(1), text_sha256="a copy")]}, "also calibration text"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], complaint: str
) -> None:
    def no_work(*_: object, **__: object) -> None:
        raise AssertionError("scored before the input was checked")

    monkeypatch.setattr("nirvana_deploy.prune.choosing.candidates.score_units", no_work)
    arguments: dict[str, Any] = {"heldout": [windows(9)]} | change
    with pytest.raises(NirvanaError, match=complaint):
        selected(tiny_llama, [windows(1)], **arguments)


def test_gamma_auto_leaves_out_what_the_model_does_not_allow(tiny_llama: Path) -> None:
    shape = shape_from_config(config_json(tiny_llama))
    usual = gamma_grid(shape, sparsity=0.2, round_to=4)
    assert usual == tuple(sorted(usual)) and 1.0 in usual and len(usual) >= 3
    assert 0 < len(gamma_grid(shape, sparsity=0.66, round_to=4)) < len(usual)
    assert gamma_grid(shape, sparsity=0.99, round_to=4) == (default_gamma(shape),)


def test_candidates_of_a_text_are_disjoint_and_can_be_drawn_again(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} says {i * i}.\n" for i in range(300)))
    checkpoint = Checkpoint.open(tiny_llama)
    sizes = {"num_sequences": 3, "seq_len": 32, "seed": 5, "heldout_sequences": 4, "heldout_len": 16}
    sets = calibration_candidates([str(text)], checkpoint, candidates=4, **sizes)
    starts = [start for one in sets.calibrations for start in one.positions]
    assert len(starts) == len(set(starts)) == 12
    for draw, one in enumerate(sets.calibrations):
        again = calibration_data(str(text), checkpoint.tokenizer, draw=draw, **sizes)
        np.testing.assert_array_equal(again.calibration.tokens, one.tokens)
        np.testing.assert_array_equal(again.heldout.tokens, sets.heldout[0].tokens)
        assert (one.seed, one.draw) == (5, draw)
    with pytest.raises(NirvanaError, match=r"room for \d+ disjoint calibration sets") as error:
        calibration_candidates([str(text)], checkpoint, candidates=1000, **sizes)
    assert "--candidates" in str(error.value)


def test_every_corpus_gives_its_sets_and_its_heldout_windows(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for text in texts:
        text.write_text("".join(f"{text.stem} {i} says {i * i}.\n" for i in range(300)))
    sizes = {"num_sequences": 3, "seq_len": 32, "seed": 5, "heldout_sequences": 4, "heldout_len": 16}
    both = calibration_candidates([str(text) for text in texts], checkpoint, candidates=2, **sizes)
    alone = [calibration_candidates([str(text)], checkpoint, candidates=2, **sizes) for text in texts]
    for found, wanted in (
        (both.calibrations, alone[0].calibrations + alone[1].calibrations),
        (both.heldout, alone[0].heldout + alone[1].heldout),
    ):
        assert [windows.source for windows in found] == [windows.source for windows in wanted]
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)


def test_candidates_that_the_model_writes_are_its_seeds(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    sizes = {"num_sequences": 2, "seq_len": 8, "heldout_sequences": 2, "heldout_len": 8}
    sets = calibration_candidates(["self"], checkpoint, candidates=2, seed=3, **sizes)
    assert [one.seed for one in sets.calibrations] == [3, 4]
    again = calibration_data("self", checkpoint.tokenizer, seed=4, checkpoint=checkpoint, **sizes)
    np.testing.assert_array_equal(again.calibration.tokens, sets.calibrations[1].tokens)


def test_what_reads_no_text_is_judged_with_its_refit_too(tiny_llama: Path, tmp_path: Path) -> None:
    dense = Checkpoint.open(tiny_llama)
    recipe = Pruning(sparsity=0.3, saliency="magnitude", allocation="global", round_to=4, ridge=1.0)
    [piece] = pieces_of([windows(1)], ["magnitude"])
    [tried] = candidates_of(Cutter(dense, recipe, seed=0), piece, (None,), tmp_path)
    assert tried.reconstruction is not None and tried.plan.reconstruct is not None
