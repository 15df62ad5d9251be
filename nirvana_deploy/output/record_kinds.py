"""What the JSON files of an output folder hold, as far as it is read back; other keys stay."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict

from msgspec import Meta

Positive = Annotated[float, Meta(gt=0)]


class Candidate(TypedDict):
    """One candidate of a choice, among others of its facts."""

    name: str
    saliency: str
    kl: float


class Spread(TypedDict):
    """KL of all candidates, nats."""

    median: float


class HeldOut(TypedDict):
    """What the candidates were judged on."""

    tokens: int


class SelectionRecord(TypedDict):
    """The choice of calibration text, saliency and gamma."""

    candidates: Annotated[list[Candidate], Meta(min_length=1)]
    winner: Annotated[int, Meta(ge=0)]
    runner_up: int | None
    separable: bool
    kl: Spread
    heldout: HeldOut


class Selected(TypedDict, total=False):
    """What the stage that chooses records, among others of its facts."""

    selection: SelectionRecord


class Quality(TypedDict, total=False):
    """Perplexity and KL of one model, in nats per token."""

    perplexity: Positive | None
    kl_vs_dense: float | None
    kl_vs_parent: float | None
    kl_standard_error: float | None
    top1_agreement: float | None
    tokens: int | None
    nll_by_window: list[float] | None
    kl_by_window: list[float] | None
    parts: dict[str, Quality]


class QualityRecord(TypedDict, total=False):
    """The content of quality.json."""

    source: str
    window_tokens: int | None
    variants: Required[dict[str, Quality]]


class Latency(TypedDict, total=False):
    """Milliseconds over the rounds of a benchmark."""

    p50: Required[Positive]
    p90: Positive | None
    p95: Positive | None
    p99: Positive | None
    samples: list[float]


class BoundedPhase(TypedDict, total=False):
    """One pass of a model, a prefill or a decode step, beside its bound on the machine.

    ``memory_ms`` is ``moved_bytes`` at the memory's speed, ``products_ms`` the operations at the rates of
    their kinds; ``bound_ms`` is the longer of the two. None: nothing of that kind was measured.
    """

    weight_bytes: float
    cache_read_bytes: float
    cache_written_bytes: float
    logits_bytes: float
    moved_bytes: Required[Positive]
    operations: Required[dict[str, float]]
    operations_per_byte: Required[Positive]
    gop_per_s: Required[Positive]
    gb_per_s: Required[Positive]
    memory_ms: float
    products_ms: float | None
    bound_ms: float | None
    share_of_bound: float | None


class Roofline(TypedDict):
    """Both passes of one model."""

    prefill: BoundedPhase
    decode: BoundedPhase


class OperatorTime(TypedDict):
    """Operators of one name in one pass; "products" are those by stored weights."""

    operator: str
    kind: Literal["products", "attention", "other"]
    nodes: int
    ms: float


class LayerTime(TypedDict):
    """Operators of one layer in one pass; ``layer`` is its number, "head" or "elsewhere"."""

    layer: str
    nodes: int
    ms: float


class ProfiledPass(TypedDict):
    """Where the time of a pass goes, with the profiler's own: kernels, between them, outside the session."""

    passes: int
    pass_ms: Positive
    kernels_ms: float
    between_ms: float
    outside_ms: float
    operators: list[OperatorTime]
    layers: list[LayerTime]


class Profile(TypedDict):
    """Both passes of one model."""

    prefill: ProfiledPass
    decode: ProfiledPass


class CeilingsRecord(TypedDict, total=False):
    """What the machine reaches at most; ``memory_gb_per_s`` is the median during the benchmark."""

    threads: Required[int]
    read_gb_per_s: Required[Positive]
    copy_gb_per_s: Required[Positive]
    gop_per_s: Required[dict[str, Positive]]
    measured_at: Required[str]
    memory_gb_per_s: Required[Positive]


class TimedVariant(TypedDict, total=False):
    """One model of a benchmark."""

    name: Required[str]
    runtime: str
    parameters: int | None
    weights_bytes: int | None
    prefill_ms: Latency | None
    ttft_ms: Latency | None
    tpot_ms: Latency | None
    itl_ms: Latency | None
    decode_tokens_per_s: float | None
    achieved_gb_per_s: float | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    kv_cache_bytes_per_token: int | None
    float_arithmetic: bool
    roofline: Roofline
    profile: Profile
    quality: Quality | None


class Interval(TypedDict):
    """Where the true median of a ratio is, with a confidence."""

    p50: Positive
    low: Positive
    high: Positive
    confidence: float


class WatchRecord(TypedDict, total=False):
    """What else the machine did, among others of its facts."""

    cautions: list[str]


class Comparison(TypedDict, total=False):
    """One model of a benchmark against the baseline: ratios of milliseconds."""

    variant: Required[str]
    baseline: str
    tpot_speedup: Positive
    prefill_speedup: Positive
    tpot_speedup_p10_p90: tuple[float, float] | None
    prefill_speedup_p10_p90: tuple[float, float] | None
    tpot_speedup_interval: Interval | None
    prefill_speedup_interval: Interval | None
    bound_tpot_speedup: float | None
    bound_prefill_speedup: float | None


class Environment(TypedDict, total=False):
    """The machine of a run, among others of its facts."""

    memory_bytes: int | None


class WorkloadRecord(TypedDict, total=False):
    """What was timed, among others of its facts."""

    prompt_tokens: int


class EvaluationRecord(TypedDict, total=False):
    """The text that quality was measured on, among others of its facts."""

    source: str | None
    window_tokens: int | None


class FailedModel(TypedDict):
    """A model that could not be loaded, or died while it was timed."""

    name: str
    path: str
    runtime: str | None
    reason: str
    hint: str | None


class OtherTimes(TypedDict):
    """Milliseconds of one model in another runtime, by round."""

    prefill_ms: Annotated[list[Positive], Meta(min_length=1)]
    tpot_ms: Annotated[list[Positive], Meta(min_length=1)]


class OtherRuntime(TypedDict):
    """An earlier benchmark of the same request, in another runtime."""

    runtime: str
    variants: dict[str, OtherTimes]


class BenchmarkRecord(TypedDict, total=False):
    """The content of benchmark.json."""

    schema: int
    environment: Environment
    watch: WatchRecord
    ceilings: CeilingsRecord
    workload: WorkloadRecord
    evaluation: EvaluationRecord
    variants: Required[list[TimedVariant]]
    comparisons: list[Comparison]
    failed: list[FailedModel]
    other_runtimes: list[OtherRuntime]


class ContestRecord(BenchmarkRecord, total=False):
    """What ``benchmark`` writes of several contenders: a benchmark.json without quality and bounds."""

    tool: Required[str]
    cautions: list[str]


class PlannedBudget(TypedDict, total=False):
    """What plan.json says of the budget."""

    asked_removed_share: Required[float]
    met_removed_share: Required[float]
    removed_groups: Required[int]
    of_groups: Required[int]
    removed_neurons: Required[int]
    removed_neurons_after_rounding: int
    of_neurons: Required[int]
    parameters_dense: Required[Annotated[int, Meta(gt=0)]]
    parameters_kept: Required[int]


class PlannedLayer(TypedDict, total=False):
    """What plan.json says of one layer."""

    layer: Required[int]
    of_groups: Required[int]
    kept_groups: Required[list[int]]
    of_neurons: Required[int]
    kept_neurons: Required[list[int]]
    site: str | None


class PlanRecord(TypedDict, total=False):
    """The content of plan.json, as far as it is told."""

    schema: int
    model: dict[str, Any]
    budget: PlannedBudget | None
    calibration: dict[str, Any] | None
    layers: Required[list[PlannedLayer]]


class LogitsRecord(TypedDict):
    """One comparison of logits."""

    name: str
    max_abs_diff: float | None
    """None where it is not finite."""
    tolerance: float | None
    passed: bool


class GreedyRecord(TypedDict):
    """One comparison of greedy continuations."""

    runtime: str
    prompts: int
    new_tokens: int
    equal_prompts: int
    ties: int
    passed: bool
    not_run: NotRequired[str | None]


class TextRecord(TypedDict):
    """One comparison of what another program's tokenizer makes of texts."""

    runtime: str
    texts: int
    equal_texts: int
    differs: str | None


class VerifiedRecord(TypedDict, total=False):
    """The verification of one model."""

    passed: Required[bool]
    checks: list[LogitsRecord]
    greedy: list[GreedyRecord]
    first_departure: str | None
    text: list[TextRecord]


class TaskFile(TypedDict):
    """A local file of tasks, among others of its facts."""

    metric: str


class Mean(TypedDict):
    """The mean over local tasks of one model, and its paired difference from the baseline's."""

    mean: float
    standard_error: float | None
    difference: float | None
    difference_standard_error: float | None


class Means(TypedDict):
    """The mean over local tasks, by model."""

    baseline: str
    tasks: list[str]
    variants: dict[str, Mean]


class TasksRecord(TypedDict, total=False):
    """The content of tasks.json."""

    limit: int | None
    files: dict[str, TaskFile]
    variants: Required[dict[str, dict[str, dict[str, float | None]]]]
    means: Means


class Drift(TypedDict):
    """The change of one kernel, relative to the dense one's size."""

    drift: float
    removed: float
    moved: float
    diagonal_removed: Annotated[list[float], Meta(min_length=1)]


class BoundedDrift(Drift):
    """The change of the Adam kernel."""

    removed_bound: float


class ZeroShot(TypedDict):
    """The change of the output, by window."""

    change: Annotated[list[float], Meta(min_length=1)]
    first_order_change: Annotated[list[float], Meta(min_length=1)]
    removed_saliency: Annotated[list[float], Meta(min_length=1)]
    removed_saliency_share: Annotated[list[float], Meta(min_length=1)]


class CutRecord(TypedDict):
    """One cut of a study of tangent kernels."""

    name: str
    saliency: str
    removed_share: float
    zero_shot: ZeroShot
    adam: BoundedDrift
    plain: Drift


class DenseKernel(TypedDict):
    """The dense model of a study of tangent kernels."""

    values: Annotated[list[float], Meta(min_length=1)]


class KernelRecord(TypedDict, total=False):
    """The content of ntk.json."""

    functional: Required[str]
    windows: Required[int]
    window_tokens: Required[int]
    source: str
    dense: Required[DenseKernel]
    cuts: Required[Annotated[list[CutRecord], Meta(min_length=1)]]
