"""The stages that a job announces are those that it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders.jobs import TINY_JOB

from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.forecast.stages import stages_of
from nirvana_deploy.pipeline.job import job_of
from nirvana_deploy.pipeline.prune_export import prune_export
from nirvana_deploy.prune.choosing.choices import choices_of

TINY: dict[str, Any] = {**TINY_JOB, "selection_sequences": 4, "selection_len": 16}
JOBS: dict[str, dict[str, Any]] = {
    "paper": {},
    "scores, refitted": {"reconstruct": True},
    "best": {"preset": "best"},
    "chosen": {"saliency": "nirvana,taylor"},
    "by bytes": {"preset": "best", "cost": "bytes"},
    "steps": {
        "preset": "best",
        "recover": "256",
        "recover_steps": 2,
        "recover_batch": 1,
        "recover_text": "pydoc",
    },
}


@pytest.mark.integration
@pytest.mark.parametrize("options", JOBS.values(), ids=JOBS)
def test_until_the_checkpoint(options: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    options = {**TINY, **options}
    prune_export(str(tiny_llama), out=tmp_path / "out", until="checkpoint", **options)
    job = job_of(str(tiny_llama), options)
    choices = choices_of(job.calibration, job.pruning, Checkpoint.open(tiny_llama).shape)
    assert tuple(Run.open(tmp_path / "out").manifest["stages"]) == stages_of(job, choices, "checkpoint")


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load
@pytest.mark.parametrize(
    "options",
    [
        {"quantize": ("w8",)},
        {"baseline": False},
        {"baseline_quantized": False, "quantize": ("w4", "w8"), "run_benchmark": False},
    ],
)
def test_of_the_whole_job(options: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    prune_export(str(tiny_llama), out=tmp_path / "out", **TINY, **options)
    job = job_of(str(tiny_llama), {**TINY, **options})
    choices = choices_of(job.calibration, job.pruning, Checkpoint.open(tiny_llama).shape)
    assert tuple(Run.open(tmp_path / "out").manifest["stages"]) == stages_of(job, choices, "report")
