"""Options that make a job on a tiny model short, as keywords and as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nirvana_deploy.pipeline.job import job_of
from nirvana_deploy.pipeline.recipe_file import write_recipe

SHORT: dict[str, Any] = {"preset": "paper", "heldout_sequences": 3, "heldout_len": 24}
"""A quick cut by scores alone; few and short evaluation windows."""
SHORT_ROUNDS: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 4, "repeats": 2}
"""A workload of a moment."""
TINY_JOB: dict[str, Any] = {
    "sparsity": 0.3,
    "calib": "pydoc",
    "round_to": 4,
    "num_sequences": 4,
    "seq_len": 16,
    "threads": 1,
    **SHORT,
    **SHORT_ROUNDS,
}
"""Such a job, on any tiny model."""


def write_short_recipe(model: Path, path: Path, **options: Any) -> Path:
    """A recipe.toml of a short job."""
    write_recipe(job_of(str(model), {**SHORT, **SHORT_ROUNDS, **options}), path)
    return path
