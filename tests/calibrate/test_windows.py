from __future__ import annotations

import hashlib
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from nirvana_deploy import calib_sets
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.calibrate import standard_library
from nirvana_deploy.calibrate.overlap import refuse_overlap
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.calibrate.stage import calibration_record, evaluation_record, every_other
from nirvana_deploy.calibrate.texts import SourceText, read_source, read_text_file
from nirvana_deploy.calibrate.windows import CalibrationData, calibration_data, windows_of_text
from nirvana_deploy.calibrate.windows_file import read_windows, write_windows
from nirvana_deploy.model.checkpoint import Checkpoint

WORDS = " ".join(str(number * number) for number in range(4000))  # every stretch of it is different


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    """One token a byte, so that lengths in a test are lengths of its text."""
    return AutoTokenizer.from_pretrained(tiny_llama)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture(autouse=True)
def little_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte tokenizer takes its time with megabytes."""
    monkeypatch.setattr(standard_library, "_MOST_BYTES", 100_000)


def drawn(source: Path | str, tokenizer: Any, **changed: Any) -> CalibrationData:
    options = {"num_sequences": 6, "seq_len": 32, "seed": 0, "heldout_sequences": 3, "heldout_len": 48}
    return calibration_data(str(source), tokenizer, **{**options, **changed})


def positions_read(data: Any) -> set[int]:
    """Every position of the stream that a set of windows covers; fails when two windows overlap."""
    covered = [p for start in data.positions for p in range(start, start + data.tokens.shape[1])]
    assert len(covered) == len(set(covered))
    return set(covered)


# --- windows --------------------------------------------------------------------------------------------


def test_windows_hold_the_text_at_their_positions(tokenizer: Any, tmp_path: Path) -> None:
    data = drawn(write(tmp_path, "notes.txt", WORDS), tokenizer)
    for windows, shape in ((data.calibration, (6, 32)), (data.heldout, (3, 48))):
        assert windows.tokens.shape == shape and windows.tokens.dtype == np.int64
        for start, window in zip(windows.positions, windows.tokens, strict=True):
            assert tokenizer.decode(window) == WORDS[start : start + shape[1]]
    assert data.calibration.source == "file notes.txt"
    assert data.calibration.text_sha256 == hashlib.sha256(WORDS.encode()).hexdigest()
    assert (data.calibration.seed, data.heldout.seed) == (0, None)


def test_same_seed_same_tokens_other_seed_other_tokens(tokenizer: Any, tmp_path: Path) -> None:
    text = write(tmp_path, "notes.txt", WORDS)
    first, again, other = (drawn(text, tokenizer, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first.calibration.tokens, again.calibration.tokens)
    assert not np.array_equal(first.calibration.tokens, other.calibration.tokens)
    assert np.array_equal(first.heldout.tokens, other.heldout.tokens)


def test_fewer_windows_are_the_first_of_more(tokenizer: Any, tmp_path: Path) -> None:
    text = write(tmp_path, "notes.txt", WORDS)
    few, many = (drawn(text, tokenizer, num_sequences=count).calibration for count in (4, 20))
    assert few.positions == many.positions[:4]


@pytest.mark.parametrize(("seq_len", "heldout_len"), [(32, 48), (48, 32), (1, 7), (100, 100), (37, 111)])
def test_no_seed_ever_reads_what_is_held_out(
    tokenizer: Any, tmp_path: Path, seq_len: int, heldout_len: int
) -> None:
    text = write(tmp_path, "notes.txt", WORDS)
    options = {"seq_len": seq_len, "heldout_len": heldout_len}
    heldout = positions_read(drawn(text, tokenizer, heldout_sequences=8, **options).heldout)
    everything = set()
    for seed in range(40):
        windows = drawn(text, tokenizer, seed=seed, num_sequences=12, **options).calibration
        everything |= positions_read(windows)
        assert windows.tokens.shape == (12, seq_len)
    assert not everything & heldout


def test_heldout_windows_are_spread_over_the_text(tokenizer: Any, tmp_path: Path) -> None:
    positions = drawn(write(tmp_path, "notes.txt", WORDS), tokenizer, heldout_sequences=4).heldout.positions
    gaps = np.diff(positions)
    assert gaps.min() > 0.8 * len(WORDS) / 4 and positions[0] < len(WORDS) / 4


def test_the_length_that_the_error_asks_for_is_the_least_that_works(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"file short\.txt is too short: it has 300 tokens") as caught:
        drawn(write(tmp_path, "short.txt", WORDS[:300]), tokenizer, num_sequences=20)
    needed = int(caught.value.message.split("need ")[-1].rstrip(".").replace(",", ""))
    assert drawn(write(tmp_path, "enough.txt", WORDS[:needed]), tokenizer, num_sequences=20)
    with pytest.raises(NirvanaError, match=f"need {needed:,}"):
        drawn(write(tmp_path, "nearly.txt", WORDS[: needed - 1]), tokenizer, num_sequences=20)


def test_the_count_that_the_error_offers_fits_and_one_more_does_not(tokenizer: Any, tmp_path: Path) -> None:
    text = write(tmp_path, "notes.txt", WORDS[:2000])
    with pytest.raises(NirvanaError, match="too short") as caught:
        drawn(text, tokenizer, num_sequences=1000)
    offered = int((caught.value.hint or "").split("--num-sequences ")[1].rstrip("."))
    assert drawn(text, tokenizer, num_sequences=offered).calibration.tokens.shape[0] == offered
    with pytest.raises(NirvanaError, match="too short"):
        drawn(text, tokenizer, num_sequences=offered + 1)


def test_text_too_short_to_hold_out(tokenizer: Any, tmp_path: Path) -> None:
    text = write(tmp_path, "short.txt", WORDS[:200])
    with pytest.raises(NirvanaError, match="0 held-out windows"):
        drawn(text, tokenizer, num_sequences=2)
    data = drawn(text, tokenizer, num_sequences=2, heldout_sequences=0)
    assert (data.calibration.tokens.shape, data.heldout.tokens.shape) == ((2, 32), (0, 48))


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_sequences", 0), ("seq_len", 0), ("seed", -1), ("heldout_sequences", -1), ("heldout_len", 0)],
)
def test_number_out_of_range_is_named(tokenizer: Any, option: str, value: int) -> None:
    with pytest.raises(NirvanaError, match=f"{option} must be at least {value + 1}, got {value}"):
        drawn("pydoc", tokenizer, **{option: value})


def test_consecutive_windows_of_evaluation_text(tokenizer: Any) -> None:
    text = SourceText("file eval.txt", (WORDS[:100],))
    windows = windows_of_text(text, tokenizer, seq_len=30)
    assert windows.positions == (0, 30, 60) and windows.seed is None
    assert tokenizer.decode(windows.tokens.ravel()) == WORDS[:90]
    assert windows_of_text(text, tokenizer, seq_len=30, max_sequences=2).tokens.shape == (2, 30)
    with pytest.raises(NirvanaError, match=r"has 100 tokens .* one window needs 101"):
        windows_of_text(text, tokenizer, seq_len=101)


def test_documents_are_joined_by_eos_and_long_ones_lose_nothing(tokenizer: Any) -> None:
    long = "a line of text\n" * 40_000  # beyond one piece
    windows = windows_of_text(SourceText("two", (long, "end")), tokenizer, seq_len=len(long) + 4)
    expected = [*long.encode(), None, *b"end"]
    decoded = [tokenizer.decode([token]) for token in windows.tokens[0, -4:]]
    assert decoded == ["</s>", "e", "n", "d"]
    assert len(expected) == windows.tokens.size
    assert tokenizer.decode(windows.tokens[0, : len(long)]) == long


# --- texts ----------------------------------------------------------------------------------------------


def test_pydoc_is_always_there(tokenizer: Any) -> None:
    data = drawn("pydoc", tokenizer, num_sequences=100)
    assert data.calibration.source == "pydoc"
    assert "The assert statement" in " ".join(read_source("pydoc").documents).replace("**", "").replace(
        '"', ""
    )


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match="not UTF-8: byte 0xe9 at offset 3") as caught:
        read_text_file(write(tmp_path, "latin.txt", b"caf\xe9"))
    assert "iconv" in (caught.value.hint or "")


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_text_file(write(tmp_path, "bom.txt", b"\xef\xbb\xbfhello")).documents == ("hello",)


@pytest.mark.parametrize(
    ("name", "content"), [("e.txt", ""), ("s.txt", " \n\t\n"), ("e.jsonl", "\n"), ("t.jsonl", '{"text": ""}')]
)
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(NirvanaError, match="is empty"):
        read_text_file(write(tmp_path, name, content))


def test_missing_file_folder_and_mistyped_name(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"gone\.txt does not exist"):
        read_source(str(tmp_path / "gone.txt"))
    with pytest.raises(NirvanaError, match="is a folder"):
        read_source(str(tmp_path))
    with pytest.raises(NirvanaError, match="Did you mean 'pydoc'"):
        read_source("pydocs")


# --- named sets -----------------------------------------------------------------------------------------


def test_every_definition_is_complete_and_holds_no_text() -> None:
    assert set(calib_sets.names()) == {"bookcorpus", "c4", "lambada", "wikitext"}
    for name in calib_sets.names():
        definition = calib_sets.load(name)
        assert "/" in definition.dataset and definition.rows > 0 and definition.licence and definition.split
    for file in Path(calib_sets.__file__).parent.glob("*.toml"):
        assert all(len(str(value)) < 100 for value in tomllib.loads(file.read_text()).values())


def test_named_set_without_datasets_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[data\]"):
        read_source("c4")


class FakeDatasets(types.ModuleType):
    """Stands in for ``datasets``: counts the rows read, or fails as a network does."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("datasets")
        self.failure, self.asked, self.rows_read = failure, (), 0

    def load_dataset(self, *where: str, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        self.asked = (*where, split, streaming)
        if self.failure:
            raise self.failure
        return self.rows()

    def rows(self) -> Iterator[dict[str, str]]:
        while True:
            self.rows_read += 1
            yield {"text": f"row {self.rows_read}"}


@pytest.mark.parametrize(("name", "documents"), [("c4", 2000), ("wikitext", 1)])
def test_named_set_reads_the_rows_that_its_definition_says(
    monkeypatch: pytest.MonkeyPatch, name: str, documents: int
) -> None:
    fake, definition = FakeDatasets(), calib_sets.load(name)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    text = read_source(name)
    assert fake.asked == (definition.dataset, definition.config, definition.split, definition.streaming)
    assert len(text.documents) == documents and text.documents[0].startswith("row 1")
    assert text.documents[-1].endswith(f"row {definition.rows}")
    assert fake.rows_read == definition.rows


def test_network_failure_of_a_named_set_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "datasets", FakeDatasets(ConnectionError("Couldn't reach the hub\ntrace"))
    )
    with pytest.raises(
        NirvanaError, match=r"'c4' \(allenai/c4 on the hub\) cannot be read: Couldn't reach the hub$"
    ):
        try:
            read_source("c4")
        except NirvanaError as error:
            assert "--calib prose" in (error.hint or "")
            raise NirvanaError(error.message) from error


# --- the model writes -----------------------------------------------------------------------------------


def test_model_writes_the_same_for_the_same_seed(tokenizer: Any, tiny_llama: Path) -> None:
    options = {"num_sequences": 18, "seq_len": 6, "heldout_sequences": 2, "heldout_len": 9}
    checkpoint = Checkpoint.open(tiny_llama)
    first, again, other = (
        drawn("self", tokenizer, checkpoint=checkpoint, seed=seed, **options) for seed in (0, 0, 1)
    )
    assert first.calibration.tokens.shape == (18, 6) and first.heldout.tokens.shape == (2, 9)
    assert np.array_equal(first.calibration.tokens, again.calibration.tokens)
    assert first.calibration.text_sha256 == again.calibration.text_sha256 != other.calibration.text_sha256
    assert np.array_equal(first.heldout.tokens, other.heldout.tokens)
    assert len(np.unique(first.calibration.tokens, axis=0)) == 18
    assert first.calibration.positions == tuple(range(0, 18 * 6, 6))


def test_the_model_goes_on_from_an_opening_with_what_it_finds_likely(
    tiny_llama: Path, tokenizer: Any
) -> None:
    import torch

    from nirvana_deploy.calibrate.openings import OPENINGS
    from nirvana_deploy.calibrate.selfwrite import written_by_model
    from nirvana_deploy.model.checkpoint import load_checkpoint

    count, length = 2 * len(OPENINGS), 12
    written = written_by_model(Checkpoint.open(tiny_llama), shapes={7: (count, length)})[7]
    tokens = torch.from_numpy(written)
    with torch.inference_mode():
        probabilities = load_checkpoint(tiny_llama)(tokens).logits[:, :-1].softmax(-1)
    # a token is of the nucleus if those that are likelier do not have 95 % together
    own = probabilities.gather(2, tokens[:, 1:, None])
    likelier = torch.where(probabilities > own, probabilities, 0.0).sum(-1)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    begun = []
    for row in range(count):
        fitting = [
            ids
            for words in OPENINGS
            if (ids := [*bos, *tokenizer(words, add_special_tokens=False)["input_ids"]])[:length]
            == written[row, : len(ids)].tolist()
        ]
        assert fitting, tokenizer.decode(written[row])
        given = max(map(len, fitting))
        begun.append(tuple(fitting[0]))
        stopped = (written[row] == tokenizer.eos_token_id).nonzero()[0]
        until = int(stopped[0]) if len(stopped) else length
        assert (likelier[row, given - 1 : until - 1] < 0.95 + 1e-5).all()
    assert len(set(begun)) > len(OPENINGS) / 2  # all kinds of text


def test_windows_that_repeat_others_are_found() -> None:
    """In whole, and most of their runs; not those that share a beginning."""
    from nirvana_deploy.calibrate.selfwrite import repeating

    first, other = np.random.default_rng(0).integers(3, 200, (2, 40))
    near = np.concatenate([first[:35], other[:5]])
    same_beginning = np.concatenate([first[:12], other[12:]])
    windows = np.stack([first, other, first, near, same_beginning[::-1], np.roll(near, 3)])
    assert repeating(windows).tolist() == [False, False, True, True, False, True]
    assert not repeating(np.stack([first, same_beginning[:40][::-1]])).any()


def test_what_repeats_is_written_anew_where_the_model_has_more_to_write() -> None:
    from nirvana_deploy.calibrate.selfwrite import _distinct, repeating

    windows = np.random.default_rng(0).integers(3, 200, (6, 40))
    twice = np.concatenate([windows[:3], windows[1:3]])
    found, dropped = _distinct(twice, lambda missing: windows[3 : 3 + missing])
    assert dropped == 2 and not repeating(found).any()
    assert np.array_equal(found, np.concatenate([windows[:3], windows[3:5]]))
    again, dropped = _distinct(twice, lambda missing: windows[:missing])  # it has no more
    assert dropped == 2 and again.shape == twice.shape and repeating(again).sum() == 2
    same, dropped = _distinct(windows, lambda missing: pytest.fail("nothing is missing"))
    assert dropped == 0 and np.array_equal(same, windows)


def test_self_without_a_model(tokenizer: Any) -> None:
    with pytest.raises(NirvanaError, match="needs the model's checkpoint"):
        drawn("self", tokenizer)


# --- mixtures -------------------------------------------------------------------------------------------


def test_a_seed_means_the_windows_that_it_always_meant(tokenizer: Any, tmp_path: Path) -> None:
    data = drawn(write(tmp_path, "notes.txt", WORDS), tokenizer, seed=3, num_sequences=20)
    assert data.calibration.positions[:6] == (5312, 26016, 9120, 160, 17200, 11200)
    assert data.calibration.parts == () == data.heldout.part_of_window


@pytest.fixture
def mixed(tokenizer: Any, tmp_path: Path) -> CalibrationData:
    """Three quarters of one file, a quarter of another."""
    write(tmp_path, "lower.txt", WORDS)
    write(tmp_path, "upper.txt", WORDS[::-1])
    calib = f"{tmp_path / 'lower.txt'},{tmp_path / 'upper.txt'}:0.25"
    return drawn(calib, tokenizer, num_sequences=20, heldout_sequences=8, seed=3)


def test_mixed_windows_are_those_of_their_parts(
    mixed: CalibrationData, tokenizer: Any, tmp_path: Path
) -> None:
    assert mixed.calibration.source == "mix of file lower.txt 0.75, file upper.txt 0.25"
    assert (mixed.calibration.seed, mixed.heldout.seed) == (3, None)
    parts = {
        "lower.txt": drawn(tmp_path / "lower.txt", tokenizer, num_sequences=15, heldout_sequences=6, seed=3),
        "upper.txt": drawn(tmp_path / "upper.txt", tokenizer, num_sequences=5, heldout_sequences=2, seed=3),
    }
    for index, one in enumerate(parts.values()):
        for whole, alone in ((mixed.calibration, one.calibration), (mixed.heldout, one.heldout)):
            assert np.array_equal(whole.by_part()[index].tokens, alone.tokens)
            assert (whole.parts[index].source, whole.parts[index].text_sha256) == (
                alone.source,
                alone.text_sha256,
            )
    hashes = "\0".join(one.calibration.text_sha256 for one in parts.values())
    assert mixed.calibration.text_sha256 == hashlib.sha256(hashes.encode()).hexdigest()


def test_the_first_windows_of_a_mixture_have_its_shares(mixed: CalibrationData) -> None:
    for count in (4, 8, 12, 20):
        assert mixed.calibration.part_of_window[:count].count(1) == count // 4


def test_draws_of_a_mixture_are_disjoint(tokenizer: Any) -> None:
    draws = [drawn("pydoc:0.6,code:0.4", tokenizer, draw=draw) for draw in (0, 1)]
    first, second = ({tuple(w) for w in one.calibration.tokens} for one in draws)
    assert not first & second
    assert np.array_equal(draws[0].heldout.tokens, draws[1].heldout.tokens)
    assert [one.calibration.draw for one in draws] == [0, 1]


def test_halves_of_held_out_windows_hold_every_part(tokenizer: Any, tmp_path: Path) -> None:
    text = write(tmp_path, "notes.txt", WORDS)
    data = drawn(f"pydoc:0.5,code:0.25,{text}:0.25", tokenizer, heldout_sequences=8).heldout
    halves = [every_other(data, first) for first in (0, 1)]
    for half in halves:
        assert [half.part_of_window.count(part) for part in range(3)] == [2, 1, 1]
    together = np.concatenate([half.tokens for half in halves])
    assert {w.tobytes() for w in together} == {w.tobytes() for w in data.tokens}


def test_every_other_window_of_one_source_alternates(tokenizer: Any) -> None:
    data = drawn("pydoc", tokenizer, heldout_sequences=5).heldout
    assert every_other(data, 1).positions == data.positions[1::2]
    assert np.array_equal(every_other(data, 0).tokens, data.tokens[0::2])


def test_a_mixture_without_held_out_windows(tokenizer: Any) -> None:
    data = drawn("pydoc:0.5,code:0.5", tokenizer, heldout_sequences=0)
    assert data.heldout.tokens.shape == (0, 48) and len(data.heldout.parts) == 2


def test_a_part_too_short_for_its_share_is_named_with_what_fits(tokenizer: Any, tmp_path: Path) -> None:
    calib = f"pydoc,{write(tmp_path, 'short.txt', WORDS[:600])}:0.3"
    with pytest.raises(
        NirvanaError, match=r"short\.txt is too short for a share of 0\.3: it has 600"
    ) as caught:
        drawn(calib, tokenizer, num_sequences=100)
    hint = caught.value.hint or ""
    assert "or file short.txt a smaller share" in hint
    offered = int(hint.split("--num-sequences ")[1].partition(",")[0])
    assert drawn(calib, tokenizer, num_sequences=offered).calibration.tokens.shape[0] == offered


def test_fewer_windows_than_parts(tokenizer: Any) -> None:
    with pytest.raises(NirvanaError, match="2 parts, which need a window each; num_sequences is 1") as caught:
        drawn("pydoc:0.5,code", tokenizer, num_sequences=1)
    assert "--num-sequences 2" in (caught.value.hint or "")


def test_other_parts_are_read_before_the_model_writes(tokenizer: Any) -> None:
    with pytest.raises(NirvanaError, match="Unknown calibration source 'pydocs'"):
        drawn("self:0.5,pydocs:0.5", tokenizer)  # without a checkpoint "self" would be refused


def test_the_named_mixture_of_a_model_that_writes(tokenizer: Any, tiny_llama: Path) -> None:
    options = {"num_sequences": 8, "heldout_sequences": 4, "seq_len": 8, "heldout_len": 8}
    first, again = (
        drawn("mix", tokenizer, checkpoint=Checkpoint.open(tiny_llama), **options) for _ in range(2)
    )
    assert np.array_equal(first.calibration.tokens, again.calibration.tokens)
    assert [part.source for part in first.calibration.parts] == ["prose", "self", "pydoc", "code"]
    assert drawn("mix", tokenizer, **options).calibration.source == "mix of prose 0.6, pydoc 0.2, code 0.2"


def test_overlap_is_judged_part_by_part(mixed: CalibrationData, tokenizer: Any, tmp_path: Path) -> None:
    refuse_overlap([mixed.calibration], [mixed.heldout])
    stolen = mixed.calibration.by_part()[1]
    with pytest.raises(NirvanaError, match=r"upper\.txt"):
        refuse_overlap([mixed.calibration], [stolen])


# --- records --------------------------------------------------------------------------------------------


def test_file_and_record_say_which_window_is_of_which_part(mixed: CalibrationData, tmp_path: Path) -> None:
    write_windows(mixed, tmp_path / "windows.safetensors")
    read = read_windows(tmp_path / "windows.safetensors")
    assert tuple(read["heldout_part"]) == mixed.heldout.part_of_window
    assert tuple(read["calibration_part"]) == mixed.calibration.part_of_window
    assert np.array_equal(read["heldout"], mixed.heldout.tokens)
    parts = calibration_record(mixed.calibration)["parts"]
    assert [(part["source"], part["share"], part["windows"]) for part in parts] == [
        ("file lower.txt", 0.75, 15),
        ("file upper.txt", 0.25, 5),
    ]
    assert parts[0]["text_sha256"] == hashlib.sha256(WORDS.encode()).hexdigest()
    heldout = evaluation_record(Calibration(), mixed.heldout)["heldout_parts"]
    assert [part["windows"] for part in heldout] == [6, 2]


def test_one_source_is_recorded_without_parts(tokenizer: Any, tmp_path: Path) -> None:
    data = drawn("pydoc", tokenizer)
    write_windows(data, tmp_path / "windows.safetensors")
    assert set(read_windows(tmp_path / "windows.safetensors")) == {"calibration", "heldout"}
    assert "parts" not in calibration_record(data.calibration)
    assert "heldout_parts" not in evaluation_record(Calibration(), data.heldout)
