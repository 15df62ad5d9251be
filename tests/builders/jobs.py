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


def write_short_recipe(model: Path, path: Path, **options: Any) -> Path:
    """A recipe.toml of a short job."""
    write_recipe(job_of(str(model), {**SHORT, **SHORT_ROUNDS, **options}), path)
    return path
