"""Time contenders in alternating rounds, each in its own process; one that fails takes no other with it.

The rounds, their prompts and their ratios are those of ``measure/benchmark.py``: a speed-up is the median of
reference over contender within the same round, beside the interval that holds its true median.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from nirvana_deploy import __version__
from nirvana_deploy.base.errors import ContenderError, NirvanaError
from nirvana_deploy.base.machine import default_threads, measured_environment
from nirvana_deploy.base.ownership.marker import TOOL
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import require_memory
from nirvana_deploy.measure.benchmark import (
    SCHEMA,
    alternate,
    precision_cautions,
    speedups,
    timed_record,
    weights_bytes,
)
from nirvana_deploy.measure.contest.contender import Contender
from nirvana_deploy.measure.contest.same_model import not_the_same
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.rounds.processes import failures, started
from nirvana_deploy.measure.rounds.ratios import ratio_of, too_few
from nirvana_deploy.measure.rounds.watch import machine_watch, wait_until_idle
from nirvana_deploy.measure.worker import RoundSample, WorkerProcess

LEAST_ROUNDS = 2


def require_rounds(workload: Workload) -> None:
    """Raise NirvanaError for rounds too few to tell a difference from noise at all."""
    if workload.repeats < LEAST_ROUNDS and workload.precision is None:
        raise NirvanaError(
            f"{workload.repeats} measured round tells no difference from noise.",
            hint="Leave --repeats out (11), or ask for an interval: --precision 3%",
        )


def time_contenders(
    contenders: Sequence[Contender],
    *,
    workload: Workload,
    cautions: Sequence[str] = (),
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Time ``contenders``, whose names differ; returns a ContestRecord.

    ``comparisons`` set every other one against the first that was timed to the end. Those that could not be
    loaded or died are in ``failed``, with the reason. Raises NirvanaError for vocabularies that differ, and
    where the memory has no room for all of them at once.
    """
    require_rounds(workload)
    on_host = [one.path for one in contenders if one.row.takes != "engine"]
    require_memory(
        sum(map(weights_bytes, on_host)),
        what=f"Timing {len(on_host)} models in turn",
        hint="Time fewer of them at once, or take a machine with more memory.",
    )
    if workload.wait_until_idle:
        wait_until_idle(max_minutes=workload.max_minutes, progress=progress)
    lost: dict[str, NirvanaError] = {}
    with started(contenders, threads=workload.threads, lost=lost, progress=progress) as workers:
        threads = workload.threads or default_threads()
        environment, watch = measured_environment(threads=threads), machine_watch(threads)
        samples = alternate(
            workers,
            workload=workload,
            vocab_size=_one_vocab_size({name: worker.loaded.vocab_size for name, worker in workers.items()}),
            baseline=next(iter(workers), None),
            watch=watch,
            lost=lost,
            progress=progress,
        )
        variants = [
            _timed(one, workers[one.name], samples[one.name], workload)
            for one in contenders
            if one.name in samples
        ]
    return {
        "schema": SCHEMA,
        "tool": f"{TOOL} {__version__}",
        "environment": environment,
        "watch": watch.record(),
        "workload": asdict(replace(workload, threads=threads)),
        "cautions": [*cautions, *_cautions(contenders, samples, workload)],
        "variants": variants,
        "comparisons": _comparisons(samples),
        "failed": failures(contenders, lost),
    }


def require_all_timed(record: Mapping[str, Any]) -> None:
    """Raise ContenderError where a model of a benchmark, a contest or a workload has failed."""
    failed = record.get("failed")
    if failed:
        names = ", ".join(one["name"] for one in failed)
        count = len(failed) + len(record["variants"])
        hints = [one["hint"] for one in failed if one["hint"]]
        raise ContenderError(
            f"{len(failed)} of {count} models failed: {names}. The others keep their results.",
            hint=hints[0] if hints else None,
        )


def _one_vocab_size(vocab_sizes: Mapping[str, int]) -> int:
    """V of all workers; 1 where there is none."""
    (reference, first), *others = list(vocab_sizes.items()) or [("", 1)]
    for name, vocab_size in others:
        if vocab_size != first:
            said = (f"a vocabulary of {size:,} tokens" for size in (first, vocab_size))
            raise not_the_same(reference, next(said), name, next(said))
    return first


def _timed(
    contender: Contender, worker: WorkerProcess, samples: Sequence[RoundSample], workload: Workload
) -> dict[str, Any]:
    """One entry of ``variants``."""
    return {
        "name": contender.name,
        "path": str(contender.path),
        "runtime_version": contender.runtime_version,
        "threads": worker.loaded.threads,
        **timed_record(contender.path, worker, samples, workload),
        "quality": None,
    }


def _comparisons(samples: Mapping[str, Sequence[RoundSample]]) -> list[dict[str, Any]]:
    if not samples:
        return []
    (reference, first), *others = samples.items()
    return [
        {
            "variant": name,
            "baseline": reference,
            **speedups(first, of_one),
            "shows_difference": {
                metric: ratio_of(
                    [getattr(one, f"{metric}_ms") for one in first],
                    [getattr(one, f"{metric}_ms") for one in of_one],
                ).shows_difference
                for metric in ("prefill", "ttft", "tpot")
            },
        }
        for name, of_one in others
    ]


def _cautions(
    contenders: Sequence[Contender], samples: Mapping[str, Sequence[RoundSample]], workload: Workload
) -> list[str]:
    found = precision_cautions(samples, workload, baseline=next(iter(samples), None))
    first = contenders[0].name
    if first not in samples and samples:
        found.append(f"{first} failed: ratios are to {next(iter(samples))}, the first that did not.")
    rounds = max(map(len, samples.values()), default=0)
    return [*found, *(too_few(rounds) if rounds else ())]
