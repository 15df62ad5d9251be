"""Model cards: what the hub reads, what people read, and that nobody's words are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.reports import frozen_records, write_records
from huggingface_hub import ModelCard

from nirvana_deploy.base.artifact import files_under, whole_folder
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.marker import CARD, CARD_NOTE
from nirvana_deploy.output.records import Records
from nirvana_deploy.report.cards.folders import calibration_text, write_cards

FOLDERS = ("checkpoint", "onnx", "dense/onnx")


def write_folders(out: Path, records: Records, files: dict[str, str] | None = None) -> Path:
    """An output folder of ``records``, whose models are a few small files."""
    write_records(out, records)
    held = {"checkpoint": {"modeling_nirvana.py": ""}, "onnx": {"model.onnx": "", "genai_config.json": "{}"}}
    for name in FOLDERS:
        with whole_folder(out / name) as folder:
            for file, text in {**held.get(name.rpartition("/")[2], {}), **(files or {})}.items():
                (folder / file).write_text(text, encoding="utf-8")
    return out


def cards(out: Path) -> dict[str, str]:
    write_cards(out)
    return {name: (out / name / CARD).read_text(encoding="utf-8") for name in FOLDERS}


@pytest.fixture
def records() -> Records:
    return frozen_records()


def model_of(records: Records) -> dict[str, Any]:
    assert records.manifest is not None
    model: dict[str, Any] = records.manifest["model"]
    return model


def test_front_matter_is_what_the_hub_reads(tmp_path: Path, records: Records) -> None:
    model_of(records).update(
        hub_id="owner/name",
        card={"license": "other", "license_name": "own", "license_link": "LICENSE", "language": ["en"]},
    )
    written = cards(write_folders(tmp_path / "out", records))
    checkpoint, onnx = (ModelCard(written[name]).data.to_dict() for name in ("checkpoint", "onnx"))
    assert checkpoint == {
        "base_model": "owner/name",
        "language": ["en"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["nirvana-deploy", "pruned", "structured-pruning"],
    }
    assert onnx == {**checkpoint, "library_name": "onnx", "tags": [*checkpoint["tags"], "onnx"]}
    assert "[owner/name](https://huggingface.co/owner/name)" in written["onnx"]
    assert "pruned" not in ModelCard(written["dense/onnx"]).data.tags


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Llama 3.2 Community", {"license": "llama3.2"}),
        ("Some Licence (v2)", {"license": "other", "license_name": "some-licence-v2"}),
        (None, {}),
    ],
)
def test_the_licence_of_a_model_without_a_card(
    tmp_path: Path, records: Records, licence: str | None, expected: dict[str, str]
) -> None:
    model_of(records).update(licence=licence, card={})
    written = cards(write_folders(tmp_path / "out", records))["onnx"]
    said = ModelCard(written).data.to_dict()
    assert {key: value for key, value in said.items() if key.startswith("license")} == expected
    assert ("names no licence" in written) == (licence is None)


def test_what_was_measured_and_where_stands_on_the_page(tmp_path: Path, records: Records) -> None:
    written = cards(write_folders(tmp_path / "out", records))
    assert records.benchmark is not None
    for name in ("checkpoint", "onnx"):
        assert "| Measure | dense | pruned | change |" in written[name]
        assert records.benchmark["environment"]["cpu"] in written[name]
        assert "was not measured" not in written[name]
    assert "from_pretrained" in written["checkpoint"] and "og.Model" in written["onnx"]


def test_without_measurements_the_page_says_so(tmp_path: Path, records: Records) -> None:
    assert records.manifest is not None
    for name in ("quality", "answers", "benchmark"):
        records.manifest["stages"].pop(name, None)
    written = cards(write_folders(tmp_path / "out", Records(records.manifest, records.plan, None)))
    assert "## Measured" not in written["onnx"]
    assert "Neither its quality nor its speed was measured." in written["onnx"]


def test_same_records_give_the_same_bytes(tmp_path: Path, records: Records) -> None:
    out = write_folders(tmp_path / "out", records)
    assert cards(out) == cards(out) == cards(write_folders(tmp_path / "elsewhere", records))


def test_nothing_names_the_machine_its_user_or_a_token(
    tmp_path: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert records.manifest is not None and records.plan is not None
    home = "/home/jane.doe"
    model_of(records).update(path=f"{home}/model", origin=f"folder {home}/model")
    records.manifest["command"] = f"nirvana-deploy prune-export {home}/model --out {home}/out"
    records.manifest["options"]["calib"] = f"{home}/customers.txt"
    records.plan["calibration"]["source"] = "file customers.txt"
    for text in cards(write_folders(tmp_path / "out", records)).values():
        for secret in ("jane", "/home", "customers", "hf_secret", str(tmp_path)):
            assert secret not in text
        assert "a text of the author's own" in text or "| Calibration" not in text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pydoc", "pydoc"),
        ("mix of self 0.6, pydoc 0.2, code 0.2", "mix of self 0.6, pydoc 0.2, code 0.2"),
        ("mix of pydoc 0.5, notes.txt 0.5", "a text of the author's own"),
        ("file notes", "a text of the author's own"),
        ("", "not recorded"),
    ],
)
def test_a_text_of_ones_own_is_not_named(source: str, said: str) -> None:
    assert calibration_text(source) == said


def test_names_of_strangers_do_no_harm(tmp_path: Path, records: Records) -> None:
    evil = "x\n---\n# |<script>alert(1)</script>"
    model_of(records).update(name=evil, hub_id=f"owner/{evil}", licence=evil, card={"license": evil})
    for text in cards(write_folders(tmp_path / "out", records)).values():
        assert "<script>" not in text.partition(CARD_NOTE)[2]
        data = ModelCard(text).data.to_dict()
        assert "base_model" not in data and data["tags"][0] == "nirvana-deploy"


def test_legal_files_are_named(tmp_path: Path, records: Records) -> None:
    out = write_folders(tmp_path / "out", records, {"LICENSE": "text", "NOTICE.txt": "text"})
    assert all("`LICENSE`, `NOTICE.txt`" in text for text in cards(out).values())


def test_a_card_is_no_part_of_what_was_made(tmp_path: Path, records: Records) -> None:
    out = write_folders(tmp_path / "out", records)
    before = files_under(out / "onnx")
    write_cards(out)
    assert (out / "onnx" / CARD).is_file() and files_under(out / "onnx") == before


def test_a_card_that_was_taken_over_stays_and_is_not_replaced(tmp_path: Path, records: Records) -> None:
    out = write_folders(tmp_path / "out", records)
    write_cards(out)
    place = out / "onnx" / CARD
    own = place.read_text(encoding="utf-8").replace(CARD_NOTE, "") + "My own words.\n"
    place.write_text(own, encoding="utf-8")
    write_cards(out)
    assert place.read_text(encoding="utf-8") == own
    with pytest.raises(NirvanaError, match=r"did not write README\.md"), whole_folder(out / "onnx"):
        pass
    assert place.read_text(encoding="utf-8") == own


def test_a_card_of_this_tool_goes_with_its_folder(tmp_path: Path, records: Records) -> None:
    out = write_folders(tmp_path / "out", records)
    write_cards(out)
    with whole_folder(out / "onnx") as folder:
        (folder / "model.onnx").write_text("new", encoding="utf-8")
    assert not (out / "onnx" / CARD).exists()


def test_a_page_that_was_there_before_stays(tmp_path: Path, records: Records) -> None:
    out = write_folders(tmp_path / "out", records)
    (out / "onnx" / CARD).write_text("Mine.", encoding="utf-8")
    write_cards(out)
    assert (out / "onnx" / CARD).read_text(encoding="utf-8") == "Mine."
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8")) == records.manifest
