"""A benchmark explained: each model's time beside its bound on this machine, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import checked_threads
from nirvana_deploy.base.progress import Progress
from nirvana_deploy.measure.benchmark import Variant
from nirvana_deploy.measure.recipe import Analysis, Workload
from nirvana_deploy.measure.roofline.bound import Roof, bounded, roof_of
from nirvana_deploy.measure.roofline.ceilings import machine_ceilings
from nirvana_deploy.measure.roofline.profile import profile_of
from nirvana_deploy.measure.rounds.watch import wait_until_idle
from nirvana_deploy.runtime.table import DEFAULT


class Explained:
    """Measures the ceilings before a benchmark, once the machine is idle if asked, and profiles behind it.

    Both are of ONNX Runtime on the CPU: for other runtimes a benchmark stays as it is. Raises NirvanaError
    where a profile of one of them is asked for.
    """

    def __init__(
        self, workload: Workload, analysis: Analysis, runtime: str | None, progress: Progress
    ) -> None:
        self._workload, self._analysis, self._progress = workload, analysis, progress
        self._ceilings = None
        if (runtime or DEFAULT) == DEFAULT:
            if workload.wait_until_idle:
                wait_until_idle(max_minutes=workload.max_minutes, progress=progress)
            self._ceilings = machine_ceilings(
                threads=checked_threads(workload.threads), fresh=analysis.fresh_ceilings, progress=progress
            )
        elif analysis.profile:
            raise NirvanaError(
                f"--profile is ONNX Runtime's on the CPU; {runtime} has none here.",
                hint="Leave out --runtime, or --profile.",
            )

    def of(self, result: dict[str, Any], variants: Mapping[str, Variant]) -> dict[str, Any]:
        """``result``, a benchmark.json, with ``ceilings`` and each variant's ``roofline`` and ``profile``."""
        if self._ceilings is None:
            return result
        speeds = [one["read_gb_per_s"] for one in result["watch"]["samples"]]
        roof = roof_of(self._ceilings, [speed for speed in speeds if speed is not None])
        explained = [
            {**record, "roofline": self._roofline(record, variants[record["name"]], roof)}
            for record in result["variants"]
        ]
        if self._analysis.profile:
            with self._progress.task("Profile", len(explained)) as advance:
                for record in explained:
                    path = variants[record["name"]].path
                    record["profile"] = profile_of(path, self._workload, threads=self._ceilings.threads)
                    advance(1)
        return {**result, "ceilings": roof.record(), "variants": explained}

    def _roofline(self, record: Mapping[str, Any], variant: Variant, roof: Roof) -> dict[str, Any]:
        asked = self._workload
        size = {"prompt_tokens": asked.prompt_tokens, "batch_size": asked.batch_size}
        prefill, decode = (
            variant.work.prefill(**size),
            variant.work.mean_decode(new_tokens=asked.new_tokens, **size),
        )
        return {
            "prefill": bounded(prefill, record["prefill_ms"]["p50"], roof),
            "decode": bounded(decode, record["tpot_ms"]["p50"], roof),
        }
