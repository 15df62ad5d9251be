"""Measure variants against a baseline in one run: prefill, TTFT, TPOT, memory, and how near the bound.

Variants take turns round by round, in an order that flips each round, so that a machine that warms up or
gets busy slows all of them alike. A speed-up is the median over rounds of baseline over variant within
the same round: drift cancels, one disturbed round does not count. Beside it stand its p10 and p90, and an
interval that holds the true median (``rounds/ratios.py``); what else the machine did is watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import measured_environment
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import require_memory
from nirvana_deploy.measure.bounds import Work
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.roofline.graph import work_of
from nirvana_deploy.measure.rounds.processes import Model, failures, require_any, started
from nirvana_deploy.measure.rounds.ratios import CONFIDENCE, ratio_of, too_few
from nirvana_deploy.measure.rounds.watch import Watch, machine_watch
from nirvana_deploy.measure.worker import RoundSample, WorkerProcess
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weight_files import weight_files
from nirvana_deploy.output.layout import is_checkpoint
from nirvana_deploy.quantize.graph.files import opened_files
from nirvana_deploy.runtime.registry import is_engine
from nirvana_deploy.runtime.tensorrt.record import engine_files

SCHEMA = 1
_ROUNDS_MORE = 6
"""At a time, where intervals are not tight enough; even, since the order flips each round."""


@dataclass(frozen=True)
class Variant:
    """One model to measure."""

    name: str
    """``dense``, ``pruned``, ..."""
    path: Path
    """ONNX folder, or engine file."""
    parameters: int
    """All weights, embeddings included."""
    embedding_parameters: int
    """Weights of embedding and head; a tied pair counts once."""
    work: Work
    float_arithmetic: bool = True
    """Products are float multiplications, so that operations of two such variants compare."""
    runtime: str | None = None
    """A name of ``runtime/table.py``; None for the one that the path is for."""


def prompt_of(workload: Workload, round_index: int, *, vocab_size: int) -> NDArray[np.int64]:
    """The prompts [N, T] of one round."""
    random = np.random.default_rng((workload.seed, round_index))
    size = (workload.batch_size, workload.prompt_tokens)
    return random.integers(0, vocab_size, size=size, dtype=np.int64)


class Timed(Protocol):
    """What can be asked for a timed round: a worker, or its stand-in."""

    def measure(self, tokens: NDArray[np.int64], *, new_tokens: int) -> RoundSample:
        """Time one request."""
        ...


def variant_from_folder(
    name: str,
    folder: Path,
    shape: ModelShape,
    *,
    parameters: int | None = None,
    float_arithmetic: bool = True,
    runtime: str | None = None,
    path: Path | None = None,
) -> Variant:
    """A variant whose counts follow from its shape and whose bytes are those of the ONNX file in ``folder``.

    ``parameters`` is the exact count when it is known; None counts linears and embeddings, which leaves out
    norms and biases. ``float_arithmetic`` is False where weights or activations are quantized. ``path``
    is what runs in the place of ``folder``: an engine that was built from it.
    """
    return Variant(
        name=name,
        path=path or folder,
        parameters=parameters or shape.linear_parameters + shape.embedding_parameters,
        embedding_parameters=shape.embedding_parameters,
        work=work_of(folder, linear_parameters=shape.linear_parameters),
        float_arithmetic=float_arithmetic,
        runtime=runtime,
    )


def benchmark(
    variants: Sequence[Variant],
    *,
    workload: Workload,
    baseline: str = "dense",
    lost: MutableMapping[str, NirvanaError] | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure ``variants``, each in its own process; returns benchmark.json (``quality`` still None).

    ``comparisons`` set every other variant against ``baseline``, if that was timed to the end. A variant that
    cannot be loaded or dies goes into ``lost`` and stands in ``failed``, with the reason; without ``lost``,
    and where all do, the error is raised. Raises NirvanaError for vocabularies that differ, and for a
    baseline that is not among the variants.
    """
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names) or baseline not in names:
        raise NirvanaError(f"Variants need distinct names, and one must be {baseline!r}; got {names}.")
    with opened(variants, threads=workload.threads, lost=lost, progress=progress) as workers:
        threads = next(iter(workers.values())).loaded.threads
        environment = measured_environment(threads=threads)
        watch = machine_watch(threads)
        samples = alternate(
            workers,
            workload=workload,
            vocab_size=common_vocab_size({n: w.loaded.vocab_size for n, w in workers.items()}),
            baseline=baseline,
            watch=watch,
            lost=lost,
            progress=progress,
        )
        require_any(samples, lost or {})
        records = {
            variant.name: _record(variant, workers[variant.name], samples[variant.name], workload)
            for variant in variants
            if variant.name in samples
        }
    watched = watch.record()
    watched["cautions"] += precision_cautions(samples, workload, baseline=baseline)
    if len(samples) > 1:
        watched["cautions"] += too_few(len(next(iter(samples.values()))))
    return {
        "schema": SCHEMA,
        "environment": environment,
        "watch": watched,
        "workload": asdict(replace(workload, threads=threads)),
        "variants": list(records.values()),
        "comparisons": [
            {
                "variant": name,
                "baseline": baseline,
                **_comparison(samples[baseline], samples[name], records[baseline], records[name]),
            }
            for name in samples
            if baseline in samples and name != baseline
        ],
        "failed": failures(variants, lost or {}),
    }


@contextmanager
def opened(
    models: Sequence[Model],
    *,
    threads: int | None,
    lost: MutableMapping[str, NirvanaError] | None,
    progress: Progress = SILENT,
) -> Iterator[dict[str, WorkerProcess]]:
    """As :func:`started`; raises NirvanaError where no one loads, or the memory has no room for all."""
    require_memory_for(model.path for model in models)
    with started(models, threads=threads, lost=lost, progress=progress) as workers:
        require_any(workers, lost or {})
        yield workers


def require_memory_for(models: Iterable[Path]) -> None:
    """Raise NirvanaError when the memory has no room for ``models`` side by side."""
    on_host = [path for path in models if not is_engine(path)]  # an engine's weights lie on its device
    require_memory(
        sum(map(weights_bytes, on_host)),
        what=f"Measuring {len(on_host)} models side by side",
        hint="Take a machine with more memory, or fewer models: --no-baseline, fewer --quantize.",
    )


def alternate(
    runners: Mapping[str, Timed],
    *,
    workload: Workload,
    vocab_size: int,
    baseline: str | None = None,
    watch: Watch | None = None,
    lost: MutableMapping[str, NirvanaError] | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress = SILENT,
) -> dict[str, list[RoundSample]]:
    """Let the runners take turns; returns each one's counted rounds, warm-up left out.

    With ``workload.precision`` there are as many rounds more as the intervals of all decode speed-ups over
    ``baseline`` need, until its minutes are over. A runner that fails goes into ``lost`` with its error and
    has no turn any more, and no samples; without ``lost`` the error is raised.
    """
    samples: dict[str, list[RoundSample]] = {name: [] for name in runners}
    ends = clock() + 60 * workload.max_minutes
    rounds, first, label = workload.warmup + workload.repeats, 0, "Benchmark"
    while first < rounds:
        with progress.task(label, (rounds - first) * len(runners)) as advance:
            for index in range(first, rounds):
                tokens = prompt_of(workload, index, vocab_size=vocab_size)
                for name in list(samples) if index % 2 == 0 else reversed(list(samples)):
                    try:
                        sample = runners[name].measure(tokens, new_tokens=workload.new_tokens)
                    except NirvanaError as error:
                        if lost is None:
                            raise
                        lost[name] = error
                        del samples[name]
                        continue
                    if index >= workload.warmup:
                        samples[name].append(sample)
                    advance(1)
                if watch is not None:
                    watch.sample()
        first = rounds
        if baseline is not None and baseline in samples and workload.precision is not None and clock() < ends:
            widest = _widest(samples, baseline)
            if widest > workload.precision:
                so_far = f"±{widest:.1%} so far" if isfinite(widest) else "no interval so far"
                rounds, label = first + _ROUNDS_MORE, f"Benchmark, {so_far}"
    return samples


def precision_cautions(
    samples: Mapping[str, Sequence[RoundSample]], workload: Workload, *, baseline: str | None
) -> list[str]:
    """A sentence where the speed-ups of ``samples`` over ``baseline`` miss ``workload.precision``."""
    if workload.precision is None or baseline is None or baseline not in samples:
        return []
    widest, rounds = _widest(samples, baseline), len(samples[baseline])
    if widest <= workload.precision:
        return []
    had = f"has ±{widest:.1%}" if isfinite(widest) else f"has no interval of {CONFIDENCE:.0%}"
    return [
        f"±{workload.precision:.1%} was asked for; after {rounds} round{'s' * (rounds > 1)} "
        f"a decode speed-up {had}. "
        "Give it more time: --max-minutes N."
    ]


def _widest(samples: Mapping[str, Sequence[RoundSample]], baseline: str) -> float:
    """The greatest width of the decode speed-ups over ``baseline``; infinite below CONFIDENCE.

    The interval of a single round has no width, and holds nothing.
    """
    of_dense = [sample.tpot_ms for sample in samples[baseline]]
    others = (of_one for name, of_one in samples.items() if name != baseline)
    ratios = (ratio_of(of_dense, [sample.tpot_ms for sample in of_one]) for of_one in others)
    return max((one.width if one.confidence >= CONFIDENCE else inf for one in ratios), default=0.0)


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """p50, p90, p95, p99 (linear between samples), mean, min, max and the samples themselves."""
    p50, p90, p95, p99 = (float(value) for value in np.percentile(samples, (50, 90, 95, 99)))
    return {
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "mean": float(np.mean(samples)),
        "min": min(samples),
        "max": max(samples),
        "samples": list(samples),
    }


def speedups(before: Sequence[RoundSample], after: Sequence[RoundSample]) -> dict[str, Any]:
    """Speed-ups of ``after`` over ``before`` from rounds paired by position, with p10, p90 and interval."""
    result: dict[str, Any] = {}
    for metric in ("prefill", "ttft", "tpot"):
        of_before, of_after = ([getattr(one, f"{metric}_ms") for one in some] for some in (before, after))
        ratio = ratio_of(of_before, of_after)
        p10, p90 = (float(value) for value in np.percentile(np.divide(of_before, of_after), (10, 90)))
        result[f"{metric}_speedup"] = ratio.p50
        result[f"{metric}_speedup_p10_p90"] = [p10, p90]
        result[f"{metric}_speedup_interval"] = asdict(ratio)
    return result


def _comparison(
    samples_before: Sequence[RoundSample],
    samples_after: Sequence[RoundSample],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> dict[str, Any]:
    """One entry of ``comparisons`` from both variants' rounds and records, names left out."""
    gains = speedups(samples_before, samples_after)
    bound_tpot = before["decode_bytes_per_step"] / after["decode_bytes_per_step"]
    # integer products cost less than float ones: counting both as operations would bound nothing
    comparable = before["float_arithmetic"] and after["float_arithmetic"]
    bound_prefill = before["prefill_flops"] / after["prefill_flops"] if comparable else None
    return {
        **gains,
        "decode_tokens_per_s_gain": gains["tpot_speedup"],
        "bound_tpot_speedup": bound_tpot,
        "bound_prefill_speedup": bound_prefill,
        "tpot_share_of_bound": gains["tpot_speedup"] / bound_tpot,
        "prefill_share_of_bound": gains["prefill_speedup"] / bound_prefill if bound_prefill else None,
        "weights_removed_share": 1 - after["weights_bytes"] / before["weights_bytes"],
        "peak_rss_removed_share": 1 - after["peak_rss_bytes"] / before["peak_rss_bytes"],
    }


def _record(
    variant: Variant, worker: WorkerProcess, samples: Sequence[RoundSample], workload: Workload
) -> dict[str, Any]:
    """One entry of ``variants``."""
    timed = timed_record(variant.path, worker, samples, workload)
    size = {"prompt_tokens": workload.prompt_tokens, "batch_size": workload.batch_size}
    decode_bytes = variant.work.mean_decode(new_tokens=workload.new_tokens, **size).read_bytes
    prefill_flops = variant.work.prefill(**size).all_operations
    return {
        "name": variant.name,
        "path": str(variant.path),
        "parameters": variant.parameters,
        "linear_parameters": variant.work.linear_parameters,
        "embedding_parameters": variant.embedding_parameters,
        "float_arithmetic": variant.float_arithmetic,
        "kv_cache_bytes_per_token": variant.work.kv_cache_bytes_per_token,
        "interpreter_rss_bytes": worker.loaded.interpreter_rss_bytes,
        **timed,
        "decode_bytes_per_step": decode_bytes,
        "achieved_gb_per_s": decode_bytes / timed["tpot_ms"]["p50"] / 1e6,
        "prefill_flops": prefill_flops,
        "achieved_gflop_per_s": prefill_flops / timed["prefill_ms"]["p50"] / 1e6,
        "quality": None,
    }


def timed_record(
    path: Path, worker: WorkerProcess, samples: Sequence[RoundSample], workload: Workload
) -> dict[str, Any]:
    """What was measured of any model: times, tokens a second, bytes."""
    prefill_ms = summary([sample.prefill_ms for sample in samples])
    tpot_ms = summary([sample.tpot_ms for sample in samples])
    return {
        "runtime": worker.loaded.runtime,
        "weights_bytes": weights_bytes(path),
        "load_ms": worker.loaded.load_ms,
        "loaded_rss_bytes": worker.loaded.loaded_rss_bytes,
        "peak_rss_bytes": worker.peak_rss_bytes,
        "peak_device_bytes": worker.peak_device_bytes,
        "prefill_ms": prefill_ms,
        "ttft_ms": summary([sample.ttft_ms for sample in samples]),
        "tpot_ms": tpot_ms,
        "itl_ms": summary([gap for sample in samples for gap in sample.itl_ms]),
        **device_times(samples),
        "prefill_tokens_per_s": 1e3 * workload.batch_size * workload.prompt_tokens / prefill_ms["p50"],
        "decode_tokens_per_s": 1e3 * workload.batch_size / tpot_ms["p50"],
    }


def device_times(samples: Sequence[RoundSample]) -> dict[str, Any]:
    """GPU compute time of prefill and of one decode pass, where every round has it; None else."""
    passes = [sample.device_ms for sample in samples if sample.device_ms]
    if len(passes) < len(samples):
        return {"prefill_device_ms": None, "decode_device_ms": None}
    decode_passes = len(samples[0].itl_ms)  # the last ones; a long prompt takes several passes before them
    return {
        "prefill_device_ms": summary([sum(of_round[:-decode_passes]) for of_round in passes]),
        "decode_device_ms": summary([ms for of_round in passes for ms in of_round[-decode_passes:]]),
    }


def weights_bytes(path: Path) -> int:
    """Bytes of the model files that are opened: engines, GGUF, graphs with their data, or safetensors."""
    files: Iterable[Path]
    if path.is_dir():
        files = weight_files(path) if is_checkpoint(path) else opened_files(path)
    else:
        files = engine_files(path) if is_engine(path) else (path,)
    return sum(file.stat().st_size for file in files)


def common_vocab_size(vocab_sizes: Mapping[str, int]) -> int:
    """The size that all variants share; raises NirvanaError where they differ."""
    if len(set(vocab_sizes.values())) > 1:
        raise NirvanaError(f"Variants of one model share a vocabulary; these differ: {dict(vocab_sizes)}.")
    return next(iter(vocab_sizes.values()))
