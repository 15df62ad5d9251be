"""Models that are timed together: one that does not load or dies loses nobody else's result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from builders.tiny_decoder import KV_HEADS, write_tiny_decoder

from nirvana_deploy.base.errors import ContenderError, NirvanaError
from nirvana_deploy.export.footprint import Footprint
from nirvana_deploy.measure.benchmark import Variant, benchmark
from nirvana_deploy.measure.bounds import Work
from nirvana_deploy.measure.contest.timing import require_all_timed
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.rounds.ratios import too_few

pytestmark = pytest.mark.integration
SHORT = Workload(prompt_tokens=4, new_tokens=2, repeats=2, threads=1)


def variant(folder: Path, name: str = "dense") -> Variant:
    footprint = Footprint(weight_bytes_per_step=1504, kv_cache_bytes_per_token=4 * 2 * 4 * sum(KV_HEADS))
    work = Work(288, footprint, products=(), mixings=(), logit_bytes=88)
    return Variant(name, folder, 976, 88, work, float_arithmetic=False)


def test_a_folder_that_does_not_load_loses_nobody_elses_result(tmp_path: Path) -> None:
    dense = variant(write_tiny_decoder(tmp_path / "onnx"))
    broken = variant(tmp_path, "pruned")
    result = benchmark([dense, broken, replace(dense, name="other")], workload=SHORT, lost={})
    assert [one["name"] for one in result["variants"]] == ["dense", "other"]
    assert [one["variant"] for one in result["comparisons"]] == ["other"]
    assert too_few(2)[0] in result["watch"]["cautions"]
    (failed,) = result["failed"]
    assert failed["name"] == "pruned" and "holds no model.onnx" in failed["reason"]
    with pytest.raises(ContenderError, match="1 of 3 models failed: pruned"):
        require_all_timed(result)
    result = benchmark([broken, dense], workload=SHORT, baseline="pruned", lost={})
    assert len(result["variants"]) == 1 and result["comparisons"] == []
    with pytest.raises(NirvanaError, match=r"pruned: .* holds no model\.onnx\.\n.*nirvana-deploy export"):
        benchmark([broken], workload=SHORT, baseline="pruned", lost={})
    with pytest.raises(NirvanaError, match=r"pruned: .* holds no model\.onnx\."):
        benchmark([dense, broken], workload=SHORT)
    assert not any("worker" in " ".join(one.cmdline()) for one in psutil.Process().children())
