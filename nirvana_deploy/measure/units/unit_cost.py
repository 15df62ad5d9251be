"""What a KV group and an FFN neuron cost where they run: bytes read, or milliseconds, per decoded token.

Milliseconds are differences: a random model with the dimensions of this one, without half of its groups or
neurons, against the same model whole, decoding in alternating rounds. Head and embedding cancel.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.export.dtypes import dtype_named
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.benchmark import alternate
from nirvana_deploy.measure.bounds import mean_context_tokens
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.worker import RoundSample, WorkerProcess
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import stored_shapes
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.curves.budget import UnitCost, weight_cost
from nirvana_deploy.prune.plan import Origin, PrunePlan, plan_of
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.schemes import scheme_named

WHOLE, FEWER_GROUPS, FEWER_NEURONS = "whole", "fewer groups", "fewer neurons"
_ENOUGH_WEIGHTS = 64_000_000
"""Linear weights of the timed model: beyond the last-level cache in 4 bits too, as real models are."""
_LEAST_LAYERS = 2
_VOCABULARY = 1024
_WHOLE_BLOCKS = 32
"""Widths are multiples of it, so that no block of quantized weights is cut."""
_STANDARD_ERRORS = 2.0
"""How many of them a difference must exceed to count as measured."""
_NOT_OF_A_STAND_IN = (
    "allow_global_per_layer_attribute_access",
    "auto_map",
    "per_layer_config",
)
"""What the config of a pruned model adds to the dense one's."""


@dataclass(frozen=True)
class UnitTime:
    """Milliseconds that one unit adds to a decode step."""

    ms: float
    """Median of paired differences."""
    error_ms: float
    """Its standard error."""

    @property
    def measured(self) -> bool:
        """Whether it stands out of the noise."""
        return self.ms > 0 and self.ms > _STANDARD_ERRORS * self.error_ms


@dataclass(frozen=True)
class UnitTimes:
    """A timed model, and what its units take."""

    group: UnitTime | None
    """None for models with one KV head, which is never cut."""
    neuron: UnitTime
    layers: int
    """Layers of the timed model."""
    step_ms: float
    """A decode step of the whole timed model: median over rounds of their lower quartile."""


def bytes_cost(shape: ModelShape, *, scheme: str | None, dtype: str, context_tokens: float) -> UnitCost:
    """Bytes that a unit adds to a decode step of one sequence with ``context_tokens``.

    Weights as ``scheme`` stores them with its default options [``dtype``], scales of blocks included, those
    of whole rows and biases left out; for a group its keys and values, too. Units of an encoder count as
    those of a decoder. Raises NirvanaError for an unknown scheme or dtype.
    """
    element_bytes = dtype_named(dtype).element_bytes
    per_weight = weight_bytes(scheme, element_bytes)
    weights = weight_cost(shape)
    cache_bytes = 2 * shape.head_dim * element_bytes * context_tokens
    return UnitCost(
        group=weights.group * per_weight + cache_bytes,
        neuron=weights.neuron * per_weight,
        measure="bytes",
    )


def measured_cost(
    checkpoint: Checkpoint,
    *,
    scheme: str | None,
    dtype: str,
    flavor: str,
    workload: Workload,
    progress: Progress = SILENT,
) -> UnitCost:
    """Milliseconds that a unit adds to a decode step of ONNX Runtime on this machine.

    A difference that does not stand out of the noise, and the KV group of a model with one KV head, takes
    its share by bytes of the other kind's time; a note says so. With neither, and for an encoder-decoder,
    whose encoder runs once per prompt, or bf16, which a CPU does not compute in, the cost is in bytes.
    Raises NirvanaError for an unknown scheme, dtype or flavor, or a worker that dies.
    """
    shape = checkpoint.shape
    context_tokens = mean_context_tokens(prompt_tokens=workload.prompt_tokens, new_tokens=workload.new_tokens)
    by_bytes = bytes_cost(shape, scheme=scheme, dtype=dtype, context_tokens=context_tokens)
    untimed = _why_untimed(shape, dtype)
    if untimed is not None:
        progress.note(f"Units are not timed: {untimed}. Their cost is the bytes that they read per token.")
        return by_bytes
    times = unit_times(
        checkpoint, scheme=scheme, dtype=dtype, flavor=flavor, workload=workload, progress=progress
    )
    return cost_of_times(times, by_bytes, progress=progress)


def unit_times(
    checkpoint: Checkpoint,
    *,
    scheme: str | None,
    dtype: str,
    flavor: str,
    workload: Workload,
    layers: int | None = None,
    progress: Progress = SILENT,
) -> UnitTimes:
    """Time a random decoder of the checkpoint's dimensions, whole and without half of its units.

    It has ``layers`` layers [64 M linear weights, at least 2 layers and at most the model's] and a small
    vocabulary. Its files lie in a temporary folder that is removed.
    """
    layers = min(layers or _enough_layers(checkpoint.shape), len(checkpoint.shape.layers))
    with tempfile.TemporaryDirectory(prefix="nirvana-cost-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        stand_in = write_stand_in(checkpoint, folder / "stand-in", layers=layers)
        plans = smaller_plans(stand_in.shape)
        progress.note(f"Timing units in a random model of {layers} layers with this model's dimensions")
        workers: dict[str, WorkerProcess] = {}
        for name, plan in {WHOLE: None, **plans}.items():
            onnx = _onnx_of(stand_in, plan, folder / name, scheme=scheme, dtype=dtype, flavor=flavor)
            worker = WorkerProcess(name, onnx, threads=workload.threads)
            workers[name] = stack.enter_context(worker)
        samples = alternate(workers, workload=workload, vocab_size=_VOCABULARY, progress=progress)
    removed = {name: plan.budget.removed_groups + plan.budget.removed_neurons for name, plan in plans.items()}
    return times_of_rounds(samples, removed, layers=layers)


def times_of_rounds(
    samples: Mapping[str, Sequence[RoundSample]], removed: Mapping[str, int], *, layers: int
) -> UnitTimes:
    """Milliseconds per unit from paired rounds; ``removed`` counts the units that a variant lacks."""
    # the lower quartile of a round: other work on the machine only ever adds time
    steps = {name: np.array([np.quantile(one.itl_ms, 0.25) for one in of]) for name, of in samples.items()}

    def unit(name: str) -> UnitTime:
        differences = (steps[WHOLE] - steps[name]) / removed[name]
        middle = float(np.median(differences))
        # robust: one disturbed round counts neither in the median nor in its error
        deviation = 1.4826 * float(np.median(np.abs(differences - middle)))
        return UnitTime(ms=middle, error_ms=1.2533 * deviation / len(differences) ** 0.5)

    return UnitTimes(
        group=unit(FEWER_GROUPS) if FEWER_GROUPS in samples else None,
        neuron=unit(FEWER_NEURONS),
        layers=layers,
        step_ms=float(np.median(steps[WHOLE])),
    )


def cost_of_times(times: UnitTimes, by_bytes: UnitCost, *, progress: Progress = SILENT) -> UnitCost:
    """The cost in ms; by bytes what was not measured."""
    group = times.group if times.group is not None and times.group.measured else None
    neuron = times.neuron if times.neuron.measured else None
    ratio = by_bytes.group / by_bytes.neuron
    if group is None and neuron is None:
        progress.note(
            "Neither a KV group nor a neuron takes a measurable time on this machine now; "
            "their cost is the bytes that they read per token."
        )
        return by_bytes
    if group is None and times.group is not None:
        progress.note(f"{_unclear('KV group', times.group)}; it counts as its bytes at a neuron's speed.")
    if neuron is None:
        progress.note(f"{_unclear('neuron', times.neuron)}; it counts as its bytes at a KV group's speed.")
    if group is not None and neuron is not None:
        return UnitCost(group=group.ms, neuron=neuron.ms, measure="ms")
    if neuron is not None:
        return UnitCost(group=neuron.ms * ratio, neuron=neuron.ms, measure="ms")
    assert group is not None
    return UnitCost(group=group.ms, neuron=group.ms / ratio, measure="ms")


def write_stand_in(checkpoint: Checkpoint, folder: Path, *, layers: int) -> Checkpoint:
    """Write a random dense decoder of the checkpoint's dimensions with ``layers`` layers, all alike."""
    config = {key: value for key, value in checkpoint.config.items() if key not in _NOT_OF_A_STAND_IN}
    config |= {
        "architectures": [checkpoint.shape.family.architecture],
        "num_hidden_layers": layers,
        "vocab_size": _VOCABULARY,
    }
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, generator=random)
        for name, size in stored_shapes(shape_from_config(config)).items()
    }
    folder.mkdir()
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(folder)


def smaller_plans(shape: ModelShape) -> dict[str, PrunePlan]:
    """Name -> the plan that removes half of one kind of unit, where there is more than one."""
    layer = shape.layers[0]
    half = layer.ffn_width // 2
    neurons = half // _WHOLE_BLOCKS * _WHOLE_BLOCKS or half
    found = {FEWER_NEURONS: _uniform_plan(shape, layer.kv_heads, neurons)}
    if shape.removable_groups(0):
        found[FEWER_GROUPS] = _uniform_plan(shape, layer.kv_heads // 2, layer.ffn_width)
    return found


def _uniform_plan(shape: ModelShape, groups: int, neurons: int) -> PrunePlan:
    """The first units of every layer stay."""
    count = len(shape.layers)
    return plan_of(
        shape,
        [tuple(range(groups))] * count,
        [tuple(range(neurons))] * count,
        origin=Origin(model_name="", sparsity=0.0, seed=0, calibration=None),
        saliency="",
        allocation="uniform",
        round_to=1,
    )


def _onnx_of(
    stand_in: Checkpoint, plan: PrunePlan | None, folder: Path, *, scheme: str | None, dtype: str, flavor: str
) -> Path:
    """The ONNX folder to time; what it was made from is removed, for three of each would take much space."""
    checkpoint = stand_in
    if plan is not None:
        slice_checkpoint(stand_in, plan, folder / "checkpoint")
        checkpoint = Checkpoint.open(folder / "checkpoint")
    onnx = folder / "onnx"
    onnx_from_checkpoint(checkpoint, onnx, dtype=dtype, flavor=flavor)
    if plan is not None:
        shutil.rmtree(checkpoint.path)
    if scheme is None:
        return onnx
    quantized = folder / "quantized"
    calibration = None
    if scheme_named(scheme).needs_calibration:
        calibration = np.random.default_rng(0).integers(0, _VOCABULARY, (4, 32), dtype=np.int64)
    quantize_onnx(onnx, quantized, _quickest(scheme), calibration=calibration)
    shutil.rmtree(onnx)
    return quantized


def _quickest(scheme: str) -> Quantization:
    """Speed does not depend on the codes."""
    options = scheme_named(scheme).options
    return Quantization(
        scheme=scheme,
        smooth="none" if "smooth" in options else None,
        rounding="plain" if "rounding" in options else None,
    )


def weight_bytes(scheme: str | None, element_bytes: int) -> float:
    """Bytes of one weight of a linear, with its share of a block's scale."""
    if scheme is None:
        return float(element_bytes)
    row = scheme_named(scheme)
    block_size = Quantization(scheme=scheme).block_size if "block_size" in row.options else None
    return row.weight_bits / 8 + (element_bytes / block_size if block_size else 0.0)


def _enough_layers(shape: ModelShape) -> int:
    per_layer = shape.linear_parameters / len(shape.layers)
    return max(_LEAST_LAYERS, round(_ENOUGH_WEIGHTS / per_layer))


def _why_untimed(shape: ModelShape, dtype: str) -> str | None:
    if shape.family.encoder_decoder:
        return "an encoder runs once per prompt and a decoder once per token"
    if dtype == "bf16":
        return "ONNX Runtime has no bfloat16 arithmetic on a CPU"
    return None


def _unclear(unit: str, time: UnitTime) -> str:
    return f"A {unit} takes {time.ms:.2g} ms per token with a standard error of {time.error_ms:.2g}"
