"""Real builds by tensorrt-rtx, on a machine without a GPU: the network is right, the files are whole."""

from __future__ import annotations

import errno
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from builders.engines import CACHE_TOKENS, LENGTHS, SMALL, exported, network_of, pruned_model, write_model
from builders.extras import needs
from builders.plans import shape_of
from builders.tiny import VOCABULARY, write_tiny
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, Qwen3Config

from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import NirvanaError, VerificationError
from nirvana_deploy.engine import build
from nirvana_deploy.engine.build import BuiltEngine, engine_from_onnx
from nirvana_deploy.engine.network import AttentionShape, check_network, expected_linears, read_network
from nirvana_deploy.engine.source import read_source
from nirvana_deploy.engine.targets import BuilderOptions
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.weights import SafetensorsWeights
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.tensorrt.record import read_engine_record, record_path
from nirvana_deploy.verify.against_torch import verify_onnx

trt = needs("tensorrt_rtx")
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned Qwen3 checkpoint, its layers of different widths."""
    folder = tmp_path_factory.mktemp("engine")
    return pruned_model(folder / "pruned", write_model(folder / "dense", "qwen3"))


def built(checkpoint: Path, folder: Path, out: Path, **options: Any) -> BuiltEngine:
    return engine_from_onnx(
        folder,
        out,
        lengths=LENGTHS,
        shape=shape_of(checkpoint),
        checkpoint=Checkpoint.open(checkpoint).multiplied_weights,
        options=SMALL,
        **options,
    )


@pytest.mark.consumer(
    "TensorRT for RTX",
    artifact="ONNX folder of a tiny Qwen3, global: built into an engine",
    proof="the network has the plan's widths and the engine is built, without a GPU; it was not run",
    package="tensorrt-rtx-cu12",
)
@pytest.mark.parametrize("in_place", [False, True], ids=["concat", "in-place"])
def test_a_pruned_decoder_is_built_as_planned(qwen3: Path, tmp_path: Path, in_place: bool) -> None:
    folder = exported(qwen3, tmp_path / "onnx", in_place=in_place)
    engine = built(qwen3, folder, tmp_path / "out")
    record = read_engine_record(engine.path)
    assert record == engine.record
    # fused attention, rotary embedding and cache update, one for one
    assert (record.layers["ATTENTION_INPUT"], record.layers["ROTARY_EMBEDDING"]) == (2, 4)
    assert record.layers.get("KV_CACHE_UPDATE", 0) == (4 if in_place else 0)
    assert "SOFTMAX" not in record.layers and record.notes == ()
    assert engine.check.attentions == 2 and engine.check.linears == 15
    assert len(engine.check.compared_with_checkpoint) >= 10
    # inputs, outputs, profiles
    inputs = {one.name: one for one in record.inputs}
    for index, layer in enumerate(shape_of(qwen3).layers):
        cache = inputs[f"past_key_values.{index}.key"]
        assert cache.shape == (None, layer.kv_heads, CACHE_TOKENS if in_place else None, 16)
    aliases = {one.name: one.alias for one in record.outputs if one.alias}
    assert aliases.get("present.1.value") == ("past_key_values.1.value" if in_place else None)
    assert [profile.name for profile in record.profiles] == ["prefill", "decode"]
    assert record.profiles[1].shapes["input_ids"] == ((1, 1), (1, 1), (2, 1))
    assert (record.kv, record.dtype, record.targets) == (
        "in-place" if in_place else "concat",
        "fp16",
        ("sm86",),
    )
    # what the build was, and of what
    assert record.onnx_sha256["model.onnx"] == sha256_of(folder / "model.onnx")
    assert record.weights_bytes > (folder / "model.onnx.data").stat().st_size * 0.9
    assert record.build.cpu_seconds > 0 and record.build.peak_rss_bytes > 50_000_000
    assert any("bind buffers of 8 bytes" in warning for warning in record.log.warnings)
    assert sha256_of(engine.path.with_suffix(".log")) == record.log.sha256
    assert "--computeCapabilities=86" in record.trtexec and "--profile=1" in record.trtexec


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load
def test_the_file_given_to_the_builder_computes_the_model(qwen3: Path, tmp_path: Path) -> None:
    for in_place in (False, True):
        folder = exported(qwen3, tmp_path / f"onnx-{in_place}", in_place=in_place)
        assert verify_onnx(qwen3, folder, new_tokens=4).passed


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_other_families_build(tmp_path: Path, kind: str) -> None:
    checkpoint = write_model(tmp_path / "model", kind)
    engine = built(checkpoint, exported(checkpoint, tmp_path / "onnx"), tmp_path / "out")
    assert engine.record.layers["ATTENTION_INPUT"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2-window", "gemma3", "olmo2", "smollm3", "granite", "phi3"])
def test_further_families_build(tmp_path: Path, kind: str) -> None:
    """The parsed network has the attentions, linears and weights of the model, 1 + w of a norm too."""
    checkpoint = write_tiny(tmp_path / "model", kind)
    for in_place in (False, True):
        folder = exported(checkpoint, tmp_path / f"onnx-{in_place}", in_place=in_place)
        record = built(checkpoint, folder, tmp_path / f"out-{in_place}").record
        assert record.layers["ATTENTION_INPUT"] == 3


def test_bfloat16_builds(qwen3: Path, tmp_path: Path) -> None:
    folder = exported(qwen3, tmp_path / "onnx", dtype="bf16", in_place=True)
    record = built(qwen3, folder, tmp_path / "out").record
    assert record.dtype == "bf16" and record.inputs[2].dtype == "bfloat16"


def test_float32_attention_is_decomposed_and_said_so(qwen3: Path, tmp_path: Path) -> None:
    folder = exported(qwen3, tmp_path / "onnx", dtype="fp32")
    record = built(qwen3, folder, tmp_path / "out").record
    assert "The graph computes in fp32: attention is decomposed" in record.notes[0]


def test_a_layer_of_few_query_heads_may_be_decomposed(qwen3: Path, tmp_path: Path) -> None:
    # one KV group of three query heads: fused for prompts, not for a single new token
    config = Qwen3Config(
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        num_hidden_layers=1,
        vocab_size=VOCABULARY,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    folder = exported(tmp_path / "model", tmp_path / "onnx")
    notes = built(tmp_path / "model", folder, tmp_path / "out").record.notes
    assert notes == (
        "1 of 1 attentions may be decomposed (fewer than 4 query heads at one new token): layers 0.",
    )


def test_the_network_is_read_in_order(qwen3: Path, tmp_path: Path) -> None:
    network, _alive = network_of(exported(qwen3, tmp_path / "onnx") / "model.onnx")
    facts, shape = read_network(trt, network), shape_of(qwen3)
    assert facts.attention == tuple(AttentionShape(x.query_heads, x.kv_heads, 16) for x in shape.layers)
    assert len({one.kv_heads for one in facts.attention}) == 2
    planned = [(one.weight + ".weight", one.inputs, one.outputs) for one in expected_linears(shape)]
    assert [(x.weight, x.inputs, x.outputs) for x in facts.linears][:-1] == planned
    head = facts.constants["lm_head.weight"].values()
    assert head is not None
    stored = SafetensorsWeights(qwen3).load("lm_head.weight").numpy().astype(np.float16)
    np.testing.assert_array_equal(head.reshape(48, VOCABULARY), stored.T)


def changed(folder: Path, change: Any) -> Path:
    """Apply ``change`` to the graph in ``folder``."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model.graph)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_another_weight_is_noticed(qwen3: Path, tmp_path: Path) -> None:
    folder = exported(qwen3, tmp_path / "onnx")
    network, _alive = network_of(folder / "model.onnx")
    facts = read_network(trt, network)
    source = read_source(folder / "model.onnx")
    check_network(facts, source, shape=shape_of(qwen3), checkpoint=SafetensorsWeights(qwen3))

    class Other:
        """The same checkpoint, one of its weights negated."""

        def __init__(self) -> None:
            self.weights = SafetensorsWeights(qwen3)

        def names(self) -> Any:
            return self.weights.names()

        def load(self, name: str) -> Any:
            return -self.weights.load(name) if name == "lm_head.weight" else self.weights.load(name)

    with pytest.raises(VerificationError, match=r"values of lm_head\.weight are not those of the checkpoint"):
        check_network(facts, source, checkpoint=Other())  # type: ignore[arg-type]


def test_a_network_of_another_graph_is_noticed(qwen3: Path, tmp_path: Path) -> None:
    folder = exported(qwen3, tmp_path / "onnx")
    network, _alive = network_of(folder / "model.onnx")
    facts = read_network(trt, network)

    def swap(graph: Any) -> None:
        nodes = [node for node in graph.node if node.op_type == "Attention"]
        nodes[0].op_type = "MatMul"
        graph.output[0].name = "scores"

    with pytest.raises(VerificationError, match=r"2 layers ATTENTION_INPUT, and 1 nodes Attention") as error:
        check_network(facts, read_source(changed(folder, swap)))
    assert "outputs are logits" in str(error.value)
    assert error.value.exit_code == 3


def test_a_plan_of_other_widths_is_noticed(qwen3: Path, tmp_path: Path) -> None:
    folder = exported(qwen3, tmp_path / "onnx")
    network, _alive = network_of(folder / "model.onnx")
    source = read_source(folder / "model.onnx")
    other = write_model(tmp_path / "other", "qwen3")
    with pytest.raises(VerificationError, match=r"attention 0 is .*kv_heads=2.* not .*kv_heads=3"):
        check_network(read_network(trt, network), source, shape=shape_of(other))


def test_an_interrupt_amid_a_write_drops_no_bytes_unnoticed(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder's binding prints an exception of ``write``, goes on, and reports success."""
    folder, out = exported(qwen3, tmp_path / "onnx"), tmp_path / "out"
    make_writer = build.make_writer

    class Interrupted:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            signal.raise_signal(signal.SIGINT)
            return int(self.file.write(data))

    monkeypatch.setattr(
        build, "make_writer", lambda t, file, errors: make_writer(t, Interrupted(file), errors)
    )
    with pytest.raises(KeyboardInterrupt):
        built(qwen3, folder, out)
    assert not list(out.glob("*.engine")) and not list(out.glob(".partial*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_amid_a_line_of_the_log_ends_the_build(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser's binding prints an exception of ``log`` and goes on."""
    folder, out = exported(qwen3, tmp_path / "onnx"), tmp_path / "out"
    make_logger, lines = build.make_logger, []

    class Lines:
        def append(self, line: tuple[str, str]) -> None:
            if not lines:
                signal.raise_signal(signal.SIGINT)
            lines.append(line)

    monkeypatch.setattr(
        build, "make_logger", lambda t, log: make_logger(t, cast(Any, SimpleNamespace(lines=Lines())))
    )
    monkeypatch.setattr(build, "read_network", lambda *_: pytest.fail("the build went on"))
    with pytest.raises(KeyboardInterrupt):
        built(qwen3, folder, out)
    assert lines


class FullDisk:
    """A file on a disk that fills up after ``room`` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(data))


def test_a_disk_that_fills_up_leaves_nothing_that_looks_whole(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = exported(qwen3, tmp_path / "onnx"), tmp_path / "out"
    first = built(qwen3, folder, out)
    assert record_path(first.path).is_file()
    make_writer = build.make_writer
    monkeypatch.setattr(
        build, "make_writer", lambda t, file, errors: make_writer(t, FullDisk(file, 100_000), errors)
    )
    with pytest.raises(NirvanaError, match="the disk is full"):
        built(qwen3, folder, out)
    assert not record_path(first.path).exists() and not list(out.glob(".partial*"))
    with pytest.raises(NirvanaError, match="never finished"):
        read_engine_record(first.path)


def test_tensorrt_takes_the_same_road(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RTX's builder under the other's name: everything but the vendor's library itself."""

    class ForThisMachine:
        """A builder whose machine has an sm86: RTX asks for a GPU where no target is named."""

        def __init__(self, logger: Any) -> None:
            self.builder = trt.Builder(logger)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.builder, name)

        def create_builder_config(self) -> Any:
            config = self.builder.create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.SM86, 0)
            return config

    names = {name: getattr(trt, name) for name in dir(trt) if not name.startswith("_")}
    module = SimpleNamespace(**names | {"Builder": ForThisMachine, "__version__": "10.15.1.29"})
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    options = BuilderOptions("tensorrt", workspace_bytes=1 << 30)
    folder = exported(qwen3, tmp_path / "onnx")
    record = engine_from_onnx(
        folder, tmp_path, lengths=LENGTHS, shape=shape_of(qwen3), options=options
    ).record
    assert (record.runtime, record.runtime_version, record.targets) == ("tensorrt", "10.15.1.29", ("native",))
    assert record.layers["ATTENTION_INPUT"] == 2 and record.engine_bytes > record.weights_bytes
    assert record.trtexec.startswith("trtexec --onnx=") and "--stronglyTyped" in record.trtexec
    assert "--computeCapabilities" not in record.trtexec
    module.__version__ = "10.13.3.9"
    with pytest.raises(NirvanaError, match=r"10\.15 and newer have"):
        engine_from_onnx(folder, tmp_path, lengths=LENGTHS, options=options)


def test_a_failed_build_gives_the_builders_reason_and_keeps_its_log(qwen3: Path, tmp_path: Path) -> None:
    folder = exported(qwen3, tmp_path / "onnx")
    options = BuilderOptions("tensorrt-rtx", targets=("sm86",), workspace_bytes=1 << 16)
    with pytest.raises(
        NirvanaError, match=r"(?s)cannot be built with tensorrt-rtx: .*workspace.*--workspace"
    ):
        engine_from_onnx(folder, tmp_path / "out", lengths=LENGTHS, options=options)
    assert "[ERROR]" in (tmp_path / "out" / "model.failed.log").read_text()
    assert not list((tmp_path / "out").glob("*.engine"))


def test_weights_cannot_be_left_out_without_a_gpu(qwen3: Path, tmp_path: Path) -> None:
    folder = exported(qwen3, tmp_path / "onnx")
    options = BuilderOptions("tensorrt-rtx", targets=("sm86",), strip_weights=True)
    with pytest.raises(NirvanaError, match=r"(?s)CUDA_SUCCESS.*need a GPU to be built"):
        engine_from_onnx(folder, tmp_path / "out", lengths=LENGTHS, options=options)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_what_the_runtimes_see_of_padding_is_the_same_mask(qwen3: Path, tmp_path: Path, dtype: str) -> None:
    """TensorRT aligns causal masks at another corner than ONNX Runtime: the graph leaves it no choice."""
    source = read_source(exported(qwen3, tmp_path / "onnx", dtype=dtype) / "model.onnx")
    model = onnx.load(source.path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Attention":
            assert [a.name for a in node.attribute if a.name in ("is_causal", "softmax_precision")] == []
            assert len([name for name in node.input if name]) == 4 and len(node.output) == 1
    network, _alive = network_of(source.path)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            assert layer.attention.causal_kind == trt.CausalMaskKind.NONE
            assert layer.attention.mask.dtype == trt.DataType.BOOL


def test_rotary_layers_rotate_halves_as_the_model_does(qwen3: Path, tmp_path: Path) -> None:
    network, _alive = network_of(exported(qwen3, tmp_path / "onnx") / "model.onnx")
    seen = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ROTARY_EMBEDDING:
            layer.__class__ = trt.IRotaryEmbeddingLayer
            assert layer.interleaved is False and layer.rotary_embedding_dim in (0, 16)
            seen += 1
    assert seen == 4


def test_cache_updates_write_one_row_after_the_other(qwen3: Path, tmp_path: Path) -> None:
    """In place and linear, each from its own input to its own output, at write_indices."""
    network, _alive = network_of(exported(qwen3, tmp_path / "onnx", in_place=True) / "model.onnx")
    updates = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.KV_CACHE_UPDATE:
            layer.__class__ = trt.IKVCacheUpdateLayer
            assert layer.cache_mode == trt.KVCacheMode.LINEAR
            updates.append((layer.get_input(0).name, layer.get_output(0).name))
    assert updates == [
        (f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}")
        for layer in range(2)
        for kind in ("key", "value")
    ]


def test_a_cache_in_place_decodes_like_one_that_grows(
    qwen3: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    grows = OrtDecoder(exported(qwen3, tmp_path / "a", dtype="fp32"))
    fixed = OrtDecoder(exported(qwen3, tmp_path / "b", dtype="fp32", in_place=True))
    prompts, new = tokens[:2, :7], tokens[:2, 7:8]
    for decoder in (grows, fixed):
        _, state = decoder.prefill(prompts)
        logits, _ = decoder.decode(new, state)
        if decoder is grows:
            expected = logits
    np.testing.assert_allclose(logits, expected, atol=1e-4)
