"""One workload, or one sweep, measured: all models in turn, each in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import measured_environment
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import require_memory
from nirvana_deploy.measure.benchmark import Variant, common_vocab_size, opened
from nirvana_deploy.measure.rounds.processes import failures, require_any
from nirvana_deploy.measure.rounds.watch import Sample, Watch, cautions, machine_watch
from nirvana_deploy.measure.worker import WorkerProcess
from nirvana_deploy.measure.workloads.energy import EnergyMeter
from nirvana_deploy.measure.workloads.measured import (
    comparisons_of,
    identity_of,
    kv_cache_bytes,
    points_of,
    times_of,
)
from nirvana_deploy.measure.workloads.named import NamedWorkload, Request
from nirvana_deploy.measure.workloads.sweep import Sweep
from nirvana_deploy.measure.workloads.turns import Answered, in_turns


def measure_workload(
    variants: Sequence[Variant],
    workload: NamedWorkload,
    *,
    threads: int | None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """One entry of workloads.json; ratios are to the first of ``variants``, if that was timed to the end.

    Those that fail are in ``failed``, with the reason. Raises NirvanaError where all do, and for what the
    memory does not hold.
    """
    longest = workload.longest()
    _require_cache(variants, longest, workload.name)
    meter, lost = EnergyMeter(), dict[str, NirvanaError]()
    with opened(variants, threads=threads, lost=lost, progress=progress) as workers:
        environment = measured_environment(threads=_threads(workers))
        watch = machine_watch(_threads(workers))
        answers = in_turns(
            workers,
            workload.timed(),
            warmup=(longest,),
            vocab_size=_vocab_size(workers),
            label=workload.name,
            lost=lost,
            watch=watch,
            meter=meter,
            progress=progress,
        )
        require_any(answers, lost)
        records = [
            {
                **identity_of(variant),
                **_process(workers[variant.name]),
                "kv_cache_bytes": kv_cache_bytes(variant.work, longest),
                **times_of(answers[variant.name]),
            }
            for variant in variants
            if variant.name in answers
        ]
    return {
        "name": workload.name,
        "file": workload.to_json(),
        "environment": environment,
        "watch": watch.record(),
        "energy_zones": list(meter.zones),
        "variants": records,
        "comparisons": comparisons_of(answers, variants[0].name),
        "failed": failures(variants, lost),
    }


def measure_sweep(
    variants: Sequence[Variant], sweep: Sweep, *, progress: Progress = SILENT
) -> dict[str, Any]:
    """One curve of workloads.json; ratios are to the first of ``variants``, if that was timed to the end.

    Values take turns within each round, models within each value. Threads belong to a process: there the
    values follow one another. Those that fail are in ``failed``, with the reason. Raises NirvanaError where
    all do, and for what the memory does not hold.
    """
    _require_cache(variants, sweep.longest(), sweep.label)
    parts = [(value,) for value in sweep.values] if sweep.axis == "threads" else [sweep.values]
    by_value: dict[int, dict[str, list[Answered]]] = {}
    watched: list[Sample] = []
    lost: dict[str, NirvanaError] = {}
    runtimes: dict[str, str] = {}
    for values in parts:
        left, threads = [one for one in variants if one.name not in lost], sweep.at(values[0]).threads
        with opened(left, threads=threads, lost=lost, progress=progress) as workers:
            environment = measured_environment(threads=_threads(workers))
            runtimes |= {name: worker.loaded.runtime for name, worker in workers.items()}
            # a new one for new processes, since it counts those that run as its own; its threads stay
            watch = machine_watch()
            by_value |= _rounds(workers, sweep, values, lost=lost, watch=watch, progress=progress)
            watched += watch.samples
        require_any([one.name for one in left if one.name not in lost], lost)
    whole = {
        value: {name: some for name, some in found.items() if name not in lost}
        for value, found in by_value.items()
    }
    curves, ratios = points_of(whole, variants[0].name)
    timed = [one for one in variants if one.name not in lost]
    return {
        "axis": sweep.axis,
        "values": list(sweep.values),
        "workload": asdict(sweep.base) | {"threads": environment["threads"]},
        "environment": environment,
        "watch": {"samples": [asdict(one) for one in watched], "cautions": cautions(watched)},
        "variants": [
            {**identity_of(variant), "runtime": runtimes[variant.name], **curve}
            for variant, curve in zip(timed, curves, strict=True)
        ],
        "comparisons": ratios,
        "failed": failures(variants, lost),
    }


def _rounds(
    workers: Mapping[str, WorkerProcess],
    sweep: Sweep,
    values: Sequence[int],
    *,
    lost: MutableMapping[str, NirvanaError],
    watch: Watch,
    progress: Progress,
) -> dict[int, dict[str, list[Answered]]]:
    """What each model answers, by value."""
    warmup = [sweep.request(value, index) for index in range(sweep.base.warmup) for value in reversed(values)]
    rounds = range(sweep.base.warmup, sweep.base.warmup + sweep.base.repeats)
    answers = in_turns(
        workers,
        [sweep.request(value, index) for index in rounds for value in values],
        warmup=warmup,
        vocab_size=_vocab_size(workers),
        label=sweep.label,
        lost=lost,
        watch=watch,
        progress=progress,
    )
    return {
        value: {name: found[place :: len(values)] for name, found in answers.items()}
        for place, value in enumerate(values)
    }


def _process(worker: WorkerProcess) -> dict[str, Any]:
    return {
        "runtime": worker.loaded.runtime,
        "load_ms": worker.loaded.load_ms,
        "peak_rss_bytes": worker.peak_rss_bytes,
        "peak_device_bytes": worker.peak_device_bytes,
    }


def _threads(workers: Mapping[str, WorkerProcess]) -> int:
    return next(iter(workers.values())).loaded.threads


def _vocab_size(workers: Mapping[str, WorkerProcess]) -> int:
    return common_vocab_size({name: worker.loaded.vocab_size for name, worker in workers.items()})


def _require_cache(variants: Sequence[Variant], longest: Request, label: str) -> None:
    """Raise NirvanaError where the memory has no room for the caches alone, one model's after another's."""
    needed = max(kv_cache_bytes(variant.work, longest) for variant in variants)
    require_memory(
        needed,
        what=f"{label}: the KV cache of {longest.batch_size} x {longest.sequence_tokens:,} tokens",
        hint="Ask for a smaller batch or fewer tokens.",
    )
