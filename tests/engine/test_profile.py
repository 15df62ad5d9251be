"""Optimization profiles: what an engine takes, refused before any builder where the graph cannot."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.engine.profile import Range, notes_on_rows, profiles_for, shapes_of
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.source import OnnxSource, read_source

IDS, FLOAT = TensorProto.INT64, TensorProto.FLOAT16
CONCAT = {
    "input_ids": (IDS, ["batch_size", "sequence_length"]),
    "attention_mask": (IDS, ["batch_size", "total_sequence_length"]),
    "past_key_values.0.key": (FLOAT, ["batch_size", 3, "past_sequence_length", 16]),
}
IN_PLACE = {
    "input_ids": (IDS, ["batch_size", "sequence_length"]),
    "write_indices": (IDS, ["batch_size"]),
    "past_key_values.0.key": (FLOAT, ["batch_size", 3, 256, 16]),
}
ENCODER = {"input_ids": (IDS, ["batch_size", "encoder_sequence_length"])}
SEQ2SEQ = {
    "input_ids": (IDS, ["batch_size", "decoder_sequence_length"]),
    "encoder_hidden_states": (FLOAT, ["batch_size", "encoder_sequence_length", 48]),
    "past_key_values.0.decoder.key": (FLOAT, ["batch_size", 3, "past_decoder_sequence_length", 16]),
    "past_key_values.0.encoder.key": (FLOAT, ["batch_size", 3, "past_encoder_sequence_length", 16]),
}


def source_of(
    folder: Path, inputs: dict[str, tuple[int, list[int | str]]], *, context: int | None = None
) -> OnnxSource:
    """An ONNX file with these inputs, which computes nothing; in place where it has write_indices."""
    nodes = [helper.make_node("Identity", [next(iter(inputs))], ["out"])]
    if "write_indices" in inputs:
        cache = "past_key_values.0.key"
        nodes.append(helper.make_node("TensorScatter", [cache, cache, "write_indices"], ["present"]))
    values = [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()]
    out = [helper.make_tensor_value_info("out", *next(iter(inputs.values())))]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values, out)), folder / "model.onnx")
    if context is not None:
        (folder / "genai_config.json").write_text(json.dumps({"model": {"context_length": context}}))
    return read_source(folder / "model.onnx")


def test_a_growing_cache_has_a_prefill_and_a_decode_profile(tmp_path: Path) -> None:
    source = source_of(tmp_path, CONCAT)
    prefill, decode = (shapes_of(source, p) for p in profiles_for(source, Lengths(max_length=100)))
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.shapes == {
        "input_ids": ((1, 1), (1, 100), (4, 100)),
        "attention_mask": ((1, 1), (1, 100), (4, 100)),
        "past_key_values.0.key": ((1, 3, 0, 16), (1, 3, 0, 16), (4, 3, 0, 16)),
    }
    assert decode.shapes == {
        "input_ids": ((1, 1), (1, 1), (4, 1)),
        "attention_mask": ((1, 2), (1, 100), (4, 100)),
        "past_key_values.0.key": ((1, 3, 1, 16), (1, 3, 99, 16), (4, 3, 99, 16)),
    }


def test_the_lengths_that_are_tuned_for_are_not_the_longest(tmp_path: Path) -> None:
    source = source_of(tmp_path, CONCAT)
    prefill, decode = profiles_for(source, Lengths(max_length=100, opt_prompt=7, opt_length=30))
    assert prefill.sizes["sequence_length"] == Range(1, 7, 100)
    assert decode.sizes["past_sequence_length"] == Range(1, 29, 99)
    assert decode.sizes["total_sequence_length"] == Range(2, 30, 100)


def test_a_cache_in_place_gives_the_longest_sequence(tmp_path: Path) -> None:
    source = source_of(tmp_path, IN_PLACE)
    prefill, decode = (shapes_of(source, p) for p in profiles_for(source, Lengths()))
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 128), (4, 256))
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (4, 1))
    assert prefill.shapes["past_key_values.0.key"] == ((1, 3, 256, 16), (1, 3, 256, 16), (4, 3, 256, 16))


def test_parts_of_an_encoder_decoder(tmp_path: Path) -> None:
    (encoder,) = profiles_for(source_of(tmp_path, ENCODER), Lengths(max_length=64, opt_prompt=8))
    assert (encoder.name, encoder.sizes["encoder_sequence_length"]) == ("encoder", Range(1, 8, 64))
    source = source_of(tmp_path, SEQ2SEQ)
    first, later = profiles_for(source, Lengths(max_length=64, opt_prompt=8, opt_length=32, max_batch=2))
    for cache in ("past_decoder_sequence_length", "past_encoder_sequence_length"):
        assert first.sizes[cache] == Range(0, 0, 0)
    assert later.sizes["past_decoder_sequence_length"] == Range(1, 31, 63)
    assert later.sizes["past_encoder_sequence_length"] == later.sizes["encoder_sequence_length"]
    assert later.sizes["batch_size"] == Range(1, 1, 2)


def test_the_default_length_is_within_the_model_context(tmp_path: Path) -> None:
    prefill, _ = profiles_for(source_of(tmp_path, CONCAT, context=512), Lengths())
    assert prefill.sizes["sequence_length"] == Range(1, 128, 512)


@pytest.mark.parametrize(
    ("inputs", "lengths", "message"),
    [
        (CONCAT, Lengths(max_batch=2, opt_batch=3), r"--opt-batch 3 and --max-batch 2 are not a range"),
        (CONCAT, Lengths(max_batch=0), r"minimum <= optimum <= maximum"),
        (CONCAT, Lengths(max_length=1), r"at least 2 tokens"),
        (CONCAT, Lengths(max_length=64, opt_prompt=65), r"--opt-prompt 65 is not between 1 and .* 64"),
        (CONCAT, Lengths(max_length=64, opt_length=0), r"--opt-length 0 is not between"),
        (CONCAT, Lengths(max_length=513), r"longer than the model's context of 512 tokens"),
        (IN_PLACE, Lengths(max_length=257), r"longer than the graph's cache of 256 slots"),
        (
            {"input_ids": (IDS, ["batch_size", "sequence_length"]), "x": (IDS, ["images"])},
            Lengths(),
            "images",
        ),
        ({**IN_PLACE, "past_key_values.0.key": (FLOAT, ["batch_size", 3, "C", 16])}, Lengths(), "one fixed"),
    ],
)
def test_what_a_graph_cannot_take_is_refused(
    tmp_path: Path, inputs: dict[str, tuple[int, list[int | str]]], lengths: Lengths, message: str
) -> None:
    with pytest.raises(NirvanaError, match=message):
        profiles_for(source_of(tmp_path, inputs, context=512), lengths)


def test_an_engine_that_stores_its_linears_twice_says_why(tmp_path: Path) -> None:
    def notes(max_batch: int, engine_bytes: int, inputs: dict[str, tuple[int, list[int | str]]]) -> list[str]:
        source = source_of(tmp_path, inputs)
        profiles = profiles_for(source, Lengths(max_batch=max_batch, max_length=64))
        shapes = [shapes_of(source, profile) for profile in profiles]
        return list(notes_on_rows(shapes, 269_000_000, engine_bytes))

    (note,) = notes(1, 503_000_000, CONCAT)
    assert note.startswith("234 MB lie beside 269 MB of weights") and "--max-batch 2" in note
    assert notes(2, 503_000_000, CONCAT) == notes(1, 292_000_000, CONCAT) == []
    assert notes(1, 503_000_000, SEQ2SEQ) == []  # its two profiles have one row each
