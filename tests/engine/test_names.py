"""Names of engines: nothing for what is usual, a word for all else."""

from __future__ import annotations

import pytest

from nirvana_deploy.engine.recipe import EngineForm
from nirvana_deploy.engine.stage import engine_name


@pytest.mark.parametrize(
    ("form", "runtime", "name"),
    [
        (EngineForm(variant="pruned"), "tensorrt-rtx", "pruned"),
        (EngineForm(variant="pruned", dtype="bf16"), "tensorrt-rtx", "pruned-bf16"),
        (
            EngineForm(variant="dense", dtype="fp32", kv="in-place", quantize="w4"),
            "tensorrt",
            "dense-w4-fp32-in-place-tensorrt",
        ),
    ],
)
def test_an_engine_is_named_after_all_that_is_not_usual(form: EngineForm, runtime: str, name: str) -> None:
    assert engine_name(form, runtime) == name
