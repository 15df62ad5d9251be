"""``w8`` and ``w4``: which linears of a folder, how they are rounded, and the graph rewritten accordingly.

Rounded without calibration, a weight is read, rounded and dropped while the folder is written. Calibrated
rounding comes before, layer by layer; its codes wait on disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import Progress
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.quantize.graph.layer_runner import (
    ENCODER_STATES,
    LAST_HIDDEN_STATE,
    decoder_prompts,
    decoder_start,
)
from nirvana_deploy.quantize.graph.linears import Linear, OnnxGraph
from nirvana_deploy.quantize.graph.names import HEAD
from nirvana_deploy.quantize.graph.packing import is_for_ort_alone, pack, pack_floats, siblings
from nirvana_deploy.quantize.int8.observe import require_prefill
from nirvana_deploy.quantize.int8.rewrite import SMALLEST_DIMENSION
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.rewriting import QuantizeInputs, Rewritten, windows_record
from nirvana_deploy.quantize.schemes import scheme_named
from nirvana_deploy.quantize.weights.embedding import embedding_of, look_up_codes
from nirvana_deploy.quantize.weights.gptq import inputs_of, round_calibrated
from nirvana_deploy.quantize.weights.layerwise import round_layerwise
from nirvana_deploy.quantize.weights.rounding import RoundedWeight, require_block_size
from nirvana_deploy.quantize.weights.write import (
    WRITINGS,
    RowCodes,
    rounded_alone,
    rounded_side_by_side,
    write_rounded,
)

ROUNDINGS = {
    "plain": "to the nearest code of a scale that reaches the block's largest weight",
    "search": "the same, each block's scale of least squared error",
    "gptq": "codes fitted to what the linears read in the calibration windows",
}
_CHANNELS_AT_ONCE = 4096
"""Rounded together by calibration: with fewer, loops over inputs are calls more than arithmetic; with more,
what they work on leaves a core's own cache."""


@dataclass(frozen=True)
class LowBit:
    """Everything that weight-only quantization needs to know beyond the float graph."""

    bits: int
    """8: one scale per output channel; 4: one per block."""
    block_size: int | None
    """Inputs that share a scale; None for 8 bits."""
    rounding: str
    writing: str
    """What reads the result: "ort" or "tensorrt" (``weight_only.py``)."""
    head: bool
    """The head is quantized as well, and in the writing "ort" the embedding (``embedding.py``)."""

    def block_of(self, linear: Linear) -> int:
        """Inputs of ``linear`` that share a scale."""
        return self.block_size or linear.K

    def to_json(self) -> dict[str, Any]:
        """For quantization.json."""
        return asdict(self)


def low_bit(recipe: Quantization, *, calibrated: bool) -> LowBit:
    """The decision of the recipe's scheme; rounding is by default calibrated where there is calibration.

    Raises NirvanaError for an unknown word, a block size that runtimes do not read, and calibrated rounding
    without calibration.
    """
    scheme = scheme_named(recipe.scheme)
    look_up(recipe.writing, WRITINGS, what="writing")
    rounding = recipe.rounding or ("gptq" if calibrated else "search")
    look_up(rounding, ROUNDINGS, what="rounding")
    in_blocks = "block_size" in scheme.options
    if in_blocks:
        require_block_size(recipe.block_size)
    if rounding == "gptq" and not calibrated:
        raise NirvanaError(
            "Rounding 'gptq' is fitted to calibration windows, and none were given.",
            hint="--calib FILE, or --rounding search, which reads the weights alone.",
        )
    return LowBit(
        bits=scheme.weight_bits,
        block_size=recipe.block_size if in_blocks else None,
        rounding=rounding,
        writing=recipe.writing,
        head=recipe.head,
    )


def rewrite_low_bit(
    graphs: Sequence[OnnxGraph], inputs: QuantizeInputs, *, scratch: Path, progress: Progress
) -> Rewritten:
    """Rewrite the linears of the float ``graphs``, their weights rounded (a ``Rewrite``).

    Codes of calibrated rounding are written to ``scratch``. Raises NirvanaError where the calibration does
    not fit, or no linear is large enough.
    """
    calibration = inputs.calibration
    spec = low_bit(inputs.recipe, calibrated=calibration is not None)
    chosen = [[linear for linear in graph.linears if _takes_part(linear, spec)] for graph in graphs]
    if not any(chosen):
        raise NirvanaError(
            f"No linear has at least {SMALLEST_DIMENSION} inputs and outputs: nothing to quantize."
        )
    windows = None
    if spec.rounding == "gptq":
        assert calibration is not None
        windows = windows_record(calibration)
        readers = _calibrated(graphs, chosen, spec, calibration, scratch, progress)
    else:
        readers = {linear.name: _uncalibrated(linear, spec) for linears in chosen for linear in linears}
    rows: dict[str, RowCodes] = {}
    embeddings: dict[str, str] = {}
    for graph, linears in zip(graphs, chosen, strict=True):
        packs: Iterable[tuple[Linear, ...]] = ((linear,) for linear in linears)
        if spec.writing == "ort":
            packs = siblings(linears)
        for members in packs:
            linear = pack(graph, members)
            written = write_rounded(
                graph,
                linear,
                partial(_joined, [readers[member.name] for member in members]),
                bits=spec.bits,
                block_size=spec.block_of(linear),
                writing=spec.writing,
            )
            if written is not None:
                rows[linear.name] = written
        if is_for_ort_alone(graph):
            pack_floats(graph, {linear.name for linear in linears})
        if spec.head and spec.writing == "ort" and (embedding := embedding_of(graph)) is not None:
            where = look_up_codes(
                graph,
                embedding,
                rows,
                tied=[linear.name for linear in linears if linear.weight is embedding.weight],
                rounded=_uncalibrated(embedding, spec),
                bits=spec.bits,
                block_size=spec.block_of(embedding),
            )
            embeddings.setdefault(embedding.name, where)
    names = [linear.name for linears in chosen for linear in linears]
    record = {
        "calibration": windows,
        "weights": spec.to_json(),
        "linears": names,
        "embeddings": embeddings,
    }
    return Rewritten(names, record)


def _takes_part(linear: Linear, spec: LowBit) -> bool:
    large = min(linear.K, linear.N) >= SMALLEST_DIMENSION
    return large and (spec.head or linear.role != HEAD)


def _joined(readers: Sequence[Callable[[], RoundedWeight]]) -> RoundedWeight:
    """The rounded weights of linears that were packed, side by side."""
    parts = [read() for read in readers]
    return replace(
        parts[0],
        codes=np.concatenate([part.codes for part in parts], axis=1),
        scales=np.concatenate([part.scales for part in parts], axis=1),
    )


def _uncalibrated(linear: Linear, spec: LowBit) -> Callable[[], RoundedWeight]:
    return partial(
        rounded_alone,
        linear,
        bits=spec.bits,
        block_size=spec.block_of(linear),
        search=spec.rounding != "plain",
    )


def _calibrated(
    graphs: Sequence[OnnxGraph],
    chosen: Sequence[Sequence[Linear]],
    spec: LowBit,
    calibration: NDArray[np.int64],
    scratch: Path,
    progress: Progress,
) -> dict[str, Callable[[], RoundedWeight]]:
    """Readers of the calibrated codes, kept in ``scratch``; an encoder is rounded before its decoder."""
    require_prefill(calibration)
    kept: dict[str, Callable[[], RoundedWeight]] = {}
    numbers = itertools.count()  # a name stands in the file, and may be any path

    def rounding(group: Sequence[Linear], hessian: NDArray[np.float32]) -> Iterator[RoundedWeight]:
        first = group[0]  # who reads one value has its K and dtype, and so the block
        fitted = partial(
            round_calibrated,
            inputs=inputs_of(hessian),
            bits=spec.bits,
            block_size=spec.block_of(first),
            scale_dtype=first.dtype.numpy(),
        )
        together = rounded_side_by_side(group, fitted, channels_at_once=_CHANNELS_AT_ONCE)
        for linear, rounded in zip(group, together, strict=True):
            kept[linear.name] = _kept(scratch / f"codes-{next(numbers)}.npy", rounded)
            yield rounded

    in_order = sorted(zip(graphs, chosen, strict=True), key=lambda pair: _reads_encoder(pair[0]))
    two = _reads_encoder(in_order[-1][0])
    prompts = [{"input_ids": window[None, : len(window) // 2 if two else None]} for window in calibration]
    for graph, linears in in_order:
        then = LAST_HIDDEN_STATE if two and not _reads_encoder(graph) else None
        states = round_layerwise(graph, linears, prompts, rounding, then=then, progress=progress)
        if then is not None:
            prompts = decoder_prompts(calibration, states, start=decoder_start(graph.path.parent))
    return kept


def _reads_encoder(graph: OnnxGraph) -> bool:
    return any(value.name == ENCODER_STATES for value in graph.model.graph.inputs)


def _kept(file: Path, rounded: RoundedWeight) -> Callable[[], RoundedWeight]:
    """Put the codes of ``rounded`` on disk; returns what reads them again."""
    np.save(file, rounded.codes, allow_pickle=False)
    scales, bits, block_size = rounded.scales, rounded.bits, rounded.block_size

    def read() -> RoundedWeight:
        codes = np.load(file, allow_pickle=False)
        return RoundedWeight(codes=codes, scales=scales, bits=bits, block_size=block_size)

    return read
