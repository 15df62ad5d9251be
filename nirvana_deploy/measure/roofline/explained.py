"""A benchmark explained: each model's time beside its bound on this machine, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import checked_threads
from nirvana_deploy.base.progress import Progress
from nirvana_deploy.measure.benchmark import Variant
from nirvana_deploy.measure.bounds import Phase
from nirvana_deploy.measure.recipe import Analysis, Workload
from nirvana_deploy.measure.roofline.bound import bounded, outrun, raised, roof_of
from nirvana_deploy.measure.roofline.ceilings import machine_ceilings
from nirvana_deploy.measure.roofline.profile import profile_of
from nirvana_deploy.measure.rounds.watch import wait_until_idle
from nirvana_deploy.runtime.table import DEFAULT


class Explained:
    """Waits for an idle machine before a benchmark, if asked; measures ceilings then, and profiles behind it.

    Both are of ONNX Runtime on the CPU: for other runtimes a benchmark stays as it is. Raises NirvanaError
    where a profile of one of them is asked for.
    """

    def __init__(
        self, workload: Workload, analysis: Analysis, runtime: str | None, progress: Progress
    ) -> None:
        self._workload, self._analysis, self._progress = workload, analysis, progress
        self._ceilings = None
        known = (runtime or DEFAULT) == DEFAULT
        if analysis.profile and not known:
            raise NirvanaError(
                f"--profile is ONNX Runtime's on the CPU; {runtime} has none here.",
                hint="Leave out --runtime, or --profile.",
            )
        if workload.wait_until_idle:
            wait_until_idle(max_minutes=workload.max_minutes, progress=progress)
        if known:
            self._ceilings = machine_ceilings(
                threads=checked_threads(workload.threads), fresh=analysis.fresh_ceilings, progress=progress
            )

    def of(self, result: dict[str, Any], variants: Mapping[str, Variant]) -> dict[str, Any]:
        """``result``, a benchmark.json, with ``ceilings`` and each variant's ``roofline`` and ``profile``."""
        if self._ceilings is None:
            return result
        seen = [one["read_gb_per_s"] for one in result["watch"]["samples"]]
        passes = [self._passes(record, variants[record["name"]]) for record in result["variants"]]
        timed = [one for of_model in passes for one in of_model.values()]
        if outrun(self._ceilings, timed):  # kept from a busier hour
            self._ceilings = machine_ceilings(
                threads=self._ceilings.threads, fresh=True, progress=self._progress
            )
        roof = raised(roof_of(self._ceilings, [speed for speed in seen if speed is not None]), timed)
        explained = [
            {**record, "roofline": {name: bounded(*one, roof) for name, one in of_model.items()}}
            for record, of_model in zip(result["variants"], passes, strict=True)
        ]
        if self._analysis.profile:
            with self._progress.task("Profile", len(explained)) as advance:
                for record in explained:
                    path = variants[record["name"]].path
                    record["profile"] = profile_of(path, self._workload, threads=self._ceilings.threads)
                    advance(1)
        return {**result, "ceilings": roof.record(), "variants": explained}

    def _passes(self, record: Mapping[str, Any], variant: Variant) -> dict[str, tuple[Phase, float]]:
        """By phase, its work and the median of its times in ms."""
        asked = self._workload
        size = {"prompt_tokens": asked.prompt_tokens, "batch_size": asked.batch_size}
        decode = variant.work.mean_decode(new_tokens=asked.new_tokens, **size)
        return {
            "prefill": (variant.work.prefill(**size), record["prefill_ms"]["p50"]),
            "decode": (decode, record["tpot_ms"]["p50"]),
        }
