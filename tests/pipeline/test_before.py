"""What is refused, shortened and said before the work of a job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.odd import edit
from builders.tiny import write_tiny

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SilentProgress
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.pipeline.before import checked, say_cost, within_context
from nirvana_deploy.pipeline.forecast.forecast import forecast
from nirvana_deploy.pipeline.job import Job, job_of

CONTEXT = 100


class Heard(SilentProgress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = write_tiny(tmp_path_factory.mktemp("short") / "model", "llama-tied")
    return Checkpoint.open(edit(folder, max_position_embeddings=CONTEXT))


def job(dense: Checkpoint, **options: Any) -> Job:
    asked = {"sparsity": 0.3, "calib": "pydoc", "seq_len": 64, "num_sequences": 32, "run_benchmark": False}
    return within_context(job_of(str(dense.path), {**asked, **options}), dense)


def test_held_out_windows_fit_the_context(short: Checkpoint, tiny_llama: Path) -> None:
    assert job(short).calibration.heldout_len == job(short).calibration.selection_len == CONTEXT
    wide = job(Checkpoint.open(tiny_llama)).calibration
    assert (wide.heldout_len, wide.selection_len) == (256, 128)


def test_a_benchmark_beyond_the_context_is_refused(short: Checkpoint) -> None:
    with pytest.raises(NirvanaError, match=r"192 tokens, .* context is 100\.\nPass --no-benchmark"):
        checked(job(short, run_benchmark=True), short, "report", Heard())
    checked(job(short, run_benchmark=True, prompt_tokens=60, new_tokens=40), short, "report", Heard())
    checked(job(short, run_benchmark=True), short, "checkpoint", Heard())


def test_training_windows_end_before_what_candidates_are_judged_on(short: Checkpoint) -> None:
    """Held-out windows are of ``selection_len`` where there is a choice, else of ``heldout_len``."""
    trained = {"recover": "10k", "recover_seq_len": 90, "selection_len": 80, "heldout_len": 96}
    checked(job(short, **trained), short, "checkpoint", Heard())
    with pytest.raises(NirvanaError, match="recover_seq_len must be at most 80, got 90"):
        checked(job(short, **trained, candidates=2), short, "checkpoint", Heard())


@pytest.mark.parametrize(
    ("options", "advised"),
    [
        ({}, True),
        ({"saliency": "taylor"}, True),
        ({"preset": "fast"}, False),
        ({"preset": "fast", "allocation": "curves"}, False),
        ({"saliency": "taylor", "allocation": "global"}, False),
    ],
)
def test_a_preset_is_advised_where_it_is_quicker(
    short: Checkpoint, options: dict[str, Any], advised: bool
) -> None:
    heard, asked = Heard(), job(short, **options)
    say_cost(asked, checked(asked, short, "checkpoint", heard), short.shape, heard)
    [said] = [note for note in heard.notes if note.startswith("Curves and refit")]
    assert ("--preset fast" in said) == advised


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": "bf16", "quantize": ("w4",)}, r"--quantize w4 runs calibration text .* no bfloat16"),
        ({"ridge": 0.0}, r"--ridge must be a positive number or 'auto', got 0\.0"),
        ({"ridge": -1.0}, r"got -1\.0"),
    ],
)
def test_what_would_fail_after_hours_is_refused_ahead(
    short: Checkpoint, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NirvanaError, match=complaint):
        checked(job(short, **options), short, "report", Heard())


def widened(checkpoint: Checkpoint, width: int) -> Checkpoint:
    """The checkpoint, said to have FFNs of another width."""
    layers = tuple(replace(layer, ffn_width=width) for layer in checkpoint.shape.layers)
    return replace(checkpoint, shape=replace(checkpoint.shape, layers=layers))


@pytest.mark.parametrize(
    ("width", "options", "told"),
    [
        (400, {"num_sequences": None}, []),
        (
            14336,
            {"num_sequences": None},
            [
                "At most 256 windows are drawn unasked: 8,192 tokens, 0.6 for each of 14,336 neurons, where "
                "20 are better: --num-sequences 8960.",
            ],
        ),
        (
            14336,
            {"num_sequences": 1000},
            [
                "Curves are measured on 8,192 tokens, 0.5 for each of the 14,336 inputs of the widest "
                "linear; below 5 their ridge is larger.",
            ],
        ),
        (14336, {"num_sequences": 1000, "preset": "fast"}, []),
    ],
)
def test_wide_models_are_told_what_their_text_lacks(
    short: Checkpoint, width: int, options: dict[str, Any], told: list[str]
) -> None:
    heard = Heard()
    checked(job(short, seq_len=32, **options), widened(short, width), "checkpoint", heard)
    said = [note for note in heard.notes if note.startswith(("At most", "Curves are measured"))]
    assert said == told


def test_steps_are_for_one_process(short: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(short, recover="2k", recover_steps=2)
    checked(asked, short, "report", Heard())
    monkeypatch.setattr("nirvana_deploy.pipeline.before.count", lambda: 2)
    with pytest.raises(NirvanaError, match=r"one of the 2 processes"):
        checked(asked, short, "report", Heard())


@pytest.mark.parametrize("limit", ["require_kl", "require_perplexity_ratio"])
def test_a_limit_without_a_dense_model_to_compare_with_is_refused(short: Checkpoint, limit: str) -> None:
    flag = f"--{limit.replace('_', '-')}"
    asked = job(short, baseline=False, **{limit: 1.5})
    with pytest.raises(NirvanaError, match=rf"\({flag}\) compares .*\nLeave out --no-baseline, or {flag}\."):
        checked(asked, short, "report", Heard())
    with pytest.raises(NirvanaError, match="A limit on quality"):  # --dry-run
        forecast(asked, out=short.path.parent / "out", until="report", progress=Heard())
    checked(job(short, **{limit: 1.5}), short, "report", Heard())
    checked(job(short, baseline=False), short, "report", Heard())
