"""What workloads.json holds. Keys that are not named here may be there too."""

from __future__ import annotations

from typing import Annotated, Literal, Required, TypedDict

from msgspec import Meta

from nirvana_deploy.output.record_kinds import (
    Environment,
    FailedModel,
    Interval,
    Latency,
    Positive,
    WatchRecord,
)


class TimedBatch(TypedDict, total=False):
    """One batch of requests, or one request at a server: lengths in tokens, times in ms."""

    prompt_tokens: Required[int]
    new_tokens: Required[int]
    ttft_ms: float
    itl_ms: list[float]
    energy_joules: float | None
    round: int
    """At a server: which of the rounds, counted from 0."""


class WorkloadVariant(TypedDict, total=False):
    """One model under one workload: latencies in ms, rates, bytes, joules."""

    name: Required[str]
    slots: int
    """Answers that its server writes at a time, if it was asked through one."""
    load_ms: float | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    kv_cache_bytes: int | None
    ttft_ms: Required[Latency]
    tpot_ms: Required[Latency]
    itl_ms: Required[Latency]
    e2e_ms: Required[Latency]
    requests_per_s: Required[Positive]
    output_tokens_per_s: Required[Positive]
    total_tokens_per_s: Required[Positive]
    round_seconds: list[float]
    """Of each round of requests at a server; ratios are of these."""
    energy_joules: float | None
    energy_joules_per_output_token: float | None
    batches: Required[Annotated[list[TimedBatch], Meta(min_length=1)]]


class WorkloadComparison(TypedDict, total=False):
    """One model under one workload against the baseline: ratios of times of the same requests, or rounds."""

    variant: Required[str]
    baseline: Required[str]
    ttft_speedup: Required[Interval]
    tpot_speedup: Required[Interval]
    e2e_speedup: Required[Interval]
    rate_speedup: Interval
    """Of requests per second, at a server."""


class WorkloadKeys(TypedDict, total=False):
    """The keys of a workload's file, among others."""

    about: str
    batch_size: Required[int]
    requests: Required[int]
    concurrency: int
    """Requests open at a time, at a server."""


class TimedWorkload(TypedDict, total=False):
    """One workload, measured."""

    name: Required[str]
    file: Required[WorkloadKeys]
    environment: Environment
    watch: WatchRecord
    energy_zones: list[str]
    variants: Required[Annotated[list[WorkloadVariant], Meta(min_length=1)]]
    comparisons: Required[list[WorkloadComparison]]
    failed: list[FailedModel]


class SweptPoint(TypedDict):
    """One model at one value of an axis."""

    value: Annotated[int, Meta(gt=0)]
    prefill_ms: Latency
    ttft_ms: Latency
    tpot_ms: Latency


class SweptVariant(TypedDict, total=False):
    """One model along an axis."""

    name: Required[str]
    runtime: str
    points: Required[Annotated[list[SweptPoint], Meta(min_length=2)]]


class SweptRatio(TypedDict):
    """Ratios of times to the baseline at one value."""

    value: int
    prefill_speedup: Interval
    ttft_speedup: Interval
    tpot_speedup: Interval


class SweptComparison(TypedDict):
    """One model against the baseline along an axis."""

    variant: str
    baseline: str
    points: list[SweptRatio]


class SweepRecord(TypedDict, total=False):
    """One sweep: times against prompt length, batch or threads."""

    axis: Required[Literal["context", "batch", "threads"]]
    workload: Required[SweptWorkload]
    environment: Environment
    watch: WatchRecord
    variants: Required[Annotated[list[SweptVariant], Meta(min_length=1)]]
    comparisons: Required[list[SweptComparison]]
    failed: list[FailedModel]


class SweptWorkload(TypedDict, total=False):
    """What stays along a sweep, among others of its facts."""

    prompt_tokens: Required[int]
    new_tokens: Required[int]
    batch_size: Required[int]
    repeats: Required[int]
    threads: int | None


class WorkloadsRecord(TypedDict, total=False):
    """The content of workloads.json."""

    schema: int
    workloads: list[TimedWorkload]
    sweeps: list[SweepRecord]


class TrafficContestRecord(TypedDict, total=False):
    """What ``benchmark`` writes of several contenders under workloads and along sweeps: a workloads.json."""

    schema: int
    tool: Required[str]
    cautions: list[str]
    workloads: Required[list[TimedWorkload]]
    sweeps: Required[list[SweepRecord]]
