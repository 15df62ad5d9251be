"""Engines of a real model, SmolLM2-135M, dense and pruned, in every precision and KV form."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.extras import needs

from nirvana_deploy.engine.build import BuiltEngine
from nirvana_deploy.engine.from_checkpoint import engines_from_checkpoint
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.targets import BuilderOptions
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_tokenizer
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import make_plan
from nirvana_deploy.prune.saliency.units import UnitScores
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.int8.spec import read_record
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.rewriting import QuantizeInputs

needs("tensorrt_rtx")
pytestmark = pytest.mark.integration

LENGTHS = Lengths(max_batch=2, max_length=512)
PROGRAMS_BYTES = {"fp16": 45_000_000, "w4": 60_000_000, "int8": 70_000_000}
"""More than the compiled programs of 30 layers take, which do not shrink with the weights."""


@dataclass
class Engines:
    """Engines of SmolLM2, built when they are first asked for."""

    folder: Path
    checkpoints: dict[str, Path]
    decided: dict[str, dict[str, Any]] = field(default_factory=dict)
    built: dict[tuple[str, str, str], BuiltEngine] = field(default_factory=dict)

    def of(self, variant: str, precision: str, kv: str) -> BuiltEngine:
        """For example ("pruned", "w4", "concat")."""
        key = (variant, precision, kv)
        if key not in self.built:
            (self.built[key],) = engines_from_checkpoint(
                Checkpoint.open(self.checkpoints[variant]),
                self.folder,
                name="-".join(key),
                kv=kv,
                quantize=None if precision == "fp16" else self.inputs(variant, precision),
                lengths=LENGTHS,
                options=BuilderOptions("tensorrt-rtx", targets=("sm86", "sm89")),
            )
        return self.built[key]

    def inputs(self, variant: str, precision: str) -> QuantizeInputs:
        """Plain rounding; the int8 decision of a variant comes from a few windows of text."""
        if precision != "int8":
            return QuantizeInputs(Quantization(scheme=precision, rounding="plain"))
        if variant not in self.decided:
            text = "The capital of France is Paris, and a list in Python is sorted by its method sort. " * 8
            ids = load_tokenizer(self.checkpoints["dense"])(text)["input_ids"]
            exported, out = self.folder / f"{variant}-fp32", self.folder / f"{variant}-int8"
            onnx_from_checkpoint(Checkpoint.open(self.checkpoints[variant]), exported)
            windows = np.array([ids[:32], ids[32:64]])
            quantize_onnx(exported, out, Quantization(scheme="int8", smooth=0.8), calibration=windows)
            self.decided[variant] = read_record(out)
        return QuantizeInputs(Quantization(scheme="int8"), decided=self.decided[variant])

    def shape(self, variant: str) -> ModelShape:
        """Dimensions of a variant."""
        return shape_from_config(config_json(self.checkpoints[variant]))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Dense, and pruned to 0.6 by scores drawn at random: layers of 1 to 3 KV groups, FFNs of many widths."""
    folder, dense = tmp_path_factory.mktemp("real"), resolve_model("smollm2").path
    shape, rng = shape_from_config(config_json(dense)), np.random.default_rng(1)
    scores = UnitScores(
        groups=tuple(rng.lognormal(size=layer.kv_heads) for layer in shape.layers),
        neurons=tuple(rng.lognormal(size=layer.ffn_width) for layer in shape.layers),
    )
    slice_checkpoint(
        Checkpoint.open(dense), make_plan(shape, scores, sparsity=0.4, saliency="random"), folder / "pruned"
    )
    return Engines(folder, {"dense": dense, "pruned": folder / "pruned"})


def check_engine(engines: Engines, variant: str, precision: str, kv: str) -> None:
    """What every engine of the grid must be."""
    engine, shape = engines.of(variant, precision, kv), engines.shape(variant)
    record, layers = engine.record, len(shape.layers)
    assert (record.dtype, record.kv) == ("fp16", kv)
    assert record.quantization == (None if precision == "fp16" else precision)
    # fused attention in every layer, rotary embedding, and the cache update where it was asked for
    assert record.layers["ATTENTION_INPUT"] == engine.check.attentions == layers
    assert record.layers["ROTARY_EMBEDDING"] == 2 * layers and "SOFTMAX" not in record.layers
    assert record.layers.get("KV_CACHE_UPDATE", 0) == (2 * layers if kv == "in-place" else 0)
    linears = 7 * layers
    if precision == "int8":
        assert record.layers["QUANTIZE"] == linears and record.layers["DEQUANTIZE"] == 2 * linears
    else:
        assert record.layers.get("DEQUANTIZE", 0) == (linears if precision == "w4" else 0)
    for index, layer in enumerate(shape.layers):
        for kind in ("key", "value"):
            (cache,) = (one for one in record.inputs if one.name == f"past_key_values.{index}.{kind}")
            assert cache.shape == (None, layer.kv_heads, 512 if kv == "in-place" else None, 64)
    few = [index for index, layer in enumerate(shape.layers) if layer.query_heads < 4]
    assert len(record.notes) == (1 if few else 0)
    if few:
        assert f"{len(few)} of {layers} attentions may be decomposed" in record.notes[0]
    # the builder stores the constants of the network, once for both profiles, and programs beside them
    log = engine.path.with_suffix(".log").read_text()
    stored = re.search(r"Total Weights Memory: (\d+) bytes", log)
    assert stored is not None
    assert int(stored[1]) == pytest.approx(record.weights_bytes, rel=0.01)
    assert 0 < record.engine_bytes - int(stored[1]) < PROGRAMS_BYTES[precision]


@pytest.mark.slow
def test_dense_and_pruned_are_in_the_proportion_of_their_weights(engines: Engines) -> None:
    for variant in ("dense", "pruned"):
        check_engine(engines, variant, "fp16", "concat")
    dense, pruned = (engines.of(variant, "fp16", "concat") for variant in ("dense", "pruned"))
    files = [engines.folder / f"{v}-fp16-concat-onnx" / "model.onnx.data" for v in ("dense", "pruned")]
    of_files = files[1].stat().st_size / files[0].stat().st_size
    assert pruned.record.weights_bytes / dense.record.weights_bytes == pytest.approx(of_files, rel=0.001)
    assert len(pruned.check.compared_with_checkpoint) >= 10
    # the programs do not shrink, and 135M parameters are few beside them: see benchmarks/engines.py
    assert of_files < pruned.record.engine_bytes / dense.record.engine_bytes < of_files * 1.12


@pytest.mark.slow
def test_a_pruned_w4_engine_updates_its_cache_in_place(engines: Engines) -> None:
    check_engine(engines, "pruned", "w4", "in-place")
    record, shape = engines.of("pruned", "w4", "in-place").record, engines.shape("pruned")
    linears = shape.linear_parameters * (4 + 16 / 32) / 8  # codes, and a scale for each block of 32
    expected = linears + 2 * shape.embedding_parameters
    assert expected < record.weights_bytes < expected * 1.05  # filled up to whole blocks


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["concat", "in-place"])
@pytest.mark.parametrize("precision", ["fp16", "int8", "w4"])
@pytest.mark.parametrize("variant", ["dense", "pruned"])
def test_the_whole_grid(engines: Engines, variant: str, precision: str, kv: str) -> None:
    check_engine(engines, variant, precision, kv)
