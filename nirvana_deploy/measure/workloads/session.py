"""One workload, or one sweep, measured: all models in turn, each in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import default_threads, measured_environment
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import require_memory
from nirvana_deploy.measure.benchmark import Variant, common_vocab_size, opened, require_memory_for
from nirvana_deploy.measure.rounds.processes import Model, failures, require_any
from nirvana_deploy.measure.rounds.watch import Sample, Watch, cautions, machine_watch
from nirvana_deploy.measure.worker import WorkerProcess
from nirvana_deploy.measure.workloads.energy import EnergyMeter
from nirvana_deploy.measure.workloads.measured import (
    comparisons_of,
    comparisons_of_rounds,
    identity_of,
    kv_cache_bytes,
    points_of,
    times_of,
    times_of_rounds,
)
from nirvana_deploy.measure.workloads.named import NamedWorkload, Request
from nirvana_deploy.measure.workloads.server import ServerProcess, listening
from nirvana_deploy.measure.workloads.sweep import Sweep
from nirvana_deploy.measure.workloads.turns import Answered, in_rounds, in_turns
from nirvana_deploy.runtime.registry import runtime_for


def measure_workload(
    models: Sequence[Model],
    workload: NamedWorkload,
    *,
    threads: int | None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """One entry of workloads.json; ratios are to the first of ``models``, if that was timed to the end.

    With ``concurrency`` each is asked through a server. Those that fail are in ``failed``, with the reason.
    Raises NirvanaError where all do, and for what the memory does not hold.
    """
    longest = workload.longest()
    _require_cache(models, longest, workload.name)
    lost: dict[str, NirvanaError] = {}
    measure = _through_servers if workload.file.concurrency else _in_workers
    found = measure(models, workload, threads=threads, lost=lost, progress=progress)
    return {
        "name": workload.name,
        "file": workload.to_json(),
        "environment": found.environment,
        "watch": found.watch.record(),
        "energy_zones": list(found.meter.zones),
        "variants": [
            {**identity_of(one), "kv_cache_bytes": _cache_bytes(one, longest), **found.numbers[one.name]}
            for one in models
            if one.name in found.numbers
        ],
        "comparisons": found.comparisons,
        "failed": failures(models, lost),
    }


@dataclass(frozen=True)
class _Measured:
    """What was found of the models of a workload, and under which circumstances."""

    environment: dict[str, Any]
    watch: Watch
    meter: EnergyMeter
    numbers: dict[str, dict[str, Any]]
    """Of each model that was timed to the end."""
    comparisons: list[dict[str, Any]]


def _in_workers(
    models: Sequence[Model],
    workload: NamedWorkload,
    *,
    threads: int | None,
    lost: MutableMapping[str, NirvanaError],
    progress: Progress,
) -> _Measured:
    """Batch after batch, each model in a process of its own."""
    meter = EnergyMeter()
    with opened(models, threads=threads, lost=lost, progress=progress) as workers:
        environment, watch = _surroundings(_threads(workers))
        answers = in_turns(
            workers,
            workload.timed(),
            warmup=(workload.longest(),),
            vocab_size=_vocab_size(workers),
            label=workload.name,
            lost=lost,
            watch=watch,
            meter=meter,
            progress=progress,
        )
        require_any(answers, lost)
        numbers = {name: {**_process(workers[name]), **times_of(found)} for name, found in answers.items()}
    comparisons = comparisons_of(answers, models[0].name)
    return _Measured(environment, watch, meter, numbers, comparisons)


def _through_servers(
    models: Sequence[Model],
    workload: NamedWorkload,
    *,
    threads: int | None,
    lost: MutableMapping[str, NirvanaError],
    progress: Progress,
) -> _Measured:
    """Round after round, each model behind a server of its own.

    All servers are there from the first round to the last, and one has work at a time: to start them anew for
    each round would put a load of the weights, and cold caches, between the two halves of a ratio.
    """
    require_memory_for(model.path for model in models)
    meter = EnergyMeter()
    with listening(models, workload, threads=threads, lost=lost, progress=progress) as servers:
        require_any(servers, lost)
        environment, watch = _surroundings(threads or default_threads())
        rounds = in_rounds(
            servers,
            workload,
            vocab_size=common_vocab_size({name: server.vocab_size for name, server in servers.items()}),
            lost=lost,
            watch=watch,
            meter=meter,
            progress=progress,
        )
        require_any(rounds, lost)
        processes = {name: _server(servers[name]) for name in rounds}
    numbers = {
        one.name: {
            "runtime": one.runtime or runtime_for(one.path),
            **processes[one.name],
            **times_of_rounds(rounds[one.name]),
        }
        for one in models
        if one.name in rounds
    }
    comparisons = comparisons_of_rounds(rounds, models[0].name)
    return _Measured(environment, watch, meter, numbers, comparisons)


def _surroundings(threads: int) -> tuple[dict[str, Any], Watch]:
    """The machine now, and a watch of what it does meanwhile."""
    return measured_environment(threads=threads), machine_watch(threads)


def measure_sweep(models: Sequence[Model], sweep: Sweep, *, progress: Progress = SILENT) -> dict[str, Any]:
    """One curve of workloads.json; ratios are to the first of ``models``, if that was timed to the end.

    Values take turns within each round, models within each value. Threads belong to a process: there the
    values follow one another. Those that fail are in ``failed``, with the reason. Raises NirvanaError where
    all do, and for what the memory does not hold.
    """
    _require_cache(models, sweep.longest(), sweep.label)
    parts = [(value,) for value in sweep.values] if sweep.axis == "threads" else [sweep.values]
    by_value: dict[int, dict[str, list[Answered]]] = {}
    watched: list[Sample] = []
    lost: dict[str, NirvanaError] = {}
    runtimes: dict[str, str] = {}
    for values in parts:
        left, threads = [one for one in models if one.name not in lost], sweep.at(values[0]).threads
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
    curves, ratios = points_of(whole, models[0].name)
    timed = [one for one in models if one.name not in lost]
    return {
        "axis": sweep.axis,
        "values": list(sweep.values),
        "workload": asdict(sweep.base) | {"threads": environment["threads"]},
        "environment": environment,
        "watch": {"samples": [asdict(one) for one in watched], "cautions": cautions(watched)},
        "variants": [
            {**identity_of(one), "runtime": runtimes[one.name], **curve}
            for one, curve in zip(timed, curves, strict=True)
        ],
        "comparisons": ratios,
        "failed": failures(models, lost),
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


def _server(server: ServerProcess) -> dict[str, Any]:
    return {
        "slots": server.slots,
        "load_ms": server.load_ms,
        "peak_rss_bytes": server.peak_rss_bytes,
        "peak_device_bytes": None,
    }


def _threads(workers: Mapping[str, WorkerProcess]) -> int:
    return next(iter(workers.values())).loaded.threads


def _vocab_size(workers: Mapping[str, WorkerProcess]) -> int:
    return common_vocab_size({name: worker.loaded.vocab_size for name, worker in workers.items()})


def _cache_bytes(model: Model, longest: Request) -> int | None:
    """None where nobody has counted the work of a model, as of one that is no variant of an output folder."""
    return kv_cache_bytes(model.work, longest) if isinstance(model, Variant) else None


def _require_cache(models: Sequence[Model], longest: Request, label: str) -> None:
    """Raise NirvanaError where the memory has no room for the caches alone, one model's after another's."""
    needed = max(_cache_bytes(model, longest) or 0 for model in models)
    require_memory(
        needed,
        what=f"{label}: the KV cache of {longest.batch_size} x {longest.sequence_tokens:,} tokens",
        hint="Ask for a smaller batch or fewer tokens.",
    )
