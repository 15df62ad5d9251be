"""``benchmark A B ...`` and ``report --against``: what a user types, sees and gets as exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.extras import needs
from builders.reports import frozen_records, write_records
from click.testing import CliRunner

from nirvana_deploy import benchmark_contenders, compare_with_earlier
from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.cli.benchmark import benchmark
from nirvana_deploy.cli.report import report
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.contest.contender import Contender
from nirvana_deploy.measure.recipe import Traffic, Workload
from nirvana_deploy.measure.workloads.named import load_workloads
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.kinds.workloads import TrafficContestRecord
from nirvana_deploy.pipeline.traffic import require_served

WORKLOAD = Workload(prompt_tokens=4, new_tokens=3, repeats=2, warmup=1, threads=1)
SHORT = ("--prompt-tokens", "4", "--new-tokens", "3", "--repeats", "2", "--threads", "1")


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a dense and a pruned model, which are the same here; an ONNX folder beside it."""
    folder = tmp_path_factory.mktemp("contest")
    out = folder / "out"
    onnx_from_checkpoint(Checkpoint.open(tiny_llama), out / "onnx")
    shutil.copytree(out / "onnx", out / "dense" / "onnx")
    shutil.copytree(out / "onnx", folder / "other")
    stages = {
        stage: {
            "files": {f"{name}/{file.name}": sha256_of(file) for file in (out / name).iterdir()},
            "result": {},
        }
        for stage, name in (("onnx", "onnx"), ("dense-onnx", "dense/onnx"))
    }
    manifest = {"schema": 1, "options": {}, "model": {"name": "m"}, "stages": stages}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def places(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that a test may damage, as the working folder."""
    folder = shutil.copytree(made, tmp_path / "places")
    monkeypatch.chdir(folder)
    return folder


def asked(command: Any, *words: object) -> Any:
    return CliRunner().invoke(command, [str(word) for word in words])


def test_the_models_of_a_folder_and_a_folder_beside_it_are_timed_and_written(places: Path) -> None:
    found = asked(benchmark, "out", "other", *SHORT, "--out", "race.json")
    assert found.exit_code == 0, found.output
    header, *rows = [line.split("\t") for line in found.stdout.splitlines() if "\t" in line]
    assert header[:4] == ["Contender", "Runtime", "TTFT", "TPOT"]
    assert [row[0] for row in rows] == ["out:dense", "out:pruned", "other"]
    assert rows[0][4:6] == ["reference", "reference"] and rows[1][4].startswith("no difference shown (")
    assert "2 rounds in turn, each contender in its own process, 1 round of warm-up left out" in found.stdout
    record = json.loads(Path("race.json").read_text())
    assert [one["name"] for one in record["variants"]] == ["out:dense", "out:pruned", "other"]
    assert len(record["variants"][0]["tpot_ms"]["samples"]) == 2 and record["failed"] == []

    again = asked(benchmark, "out:pruned", "out/onnx", *SHORT, "--out", "race.json", "--json")
    assert again.exit_code == 1 and "--force" in str(again.exception)
    replacing = ("--out", "race.json", "--force", "--json")
    again = asked(benchmark, "out:pruned", "out/onnx", "out:pruned", *SHORT, *replacing)
    assert again.exit_code == 0, again.output
    names = [one["name"] for one in json.loads(again.stdout)["variants"]]
    assert names == ["out:pruned", "out/onnx", "out:pruned (2)"]
    same = asked(report, "race.json", "--against", "race.json")
    assert same.exit_code == 0 and "unchanged" in same.stdout


def test_contenders_are_timed_under_a_workload_and_along_a_sweep(places: Path) -> None:
    Path("mine.toml").write_text("prompt_tokens = [4, 8]\nnew_tokens = 3\nbatch_size = 2\nrequests = 12\n")
    sweep = ("--sweep", "context=4,8", "--new-tokens", "3", "--repeats", "2")
    words = ("--workload", "mine.toml", *sweep, "--threads", "1", "--out", "race.json")
    found = asked(benchmark, "out:pruned", "other", *words)
    assert found.exit_code == 0, found.output
    for said in ("# Workload mine", "# Against prompt tokens", "Record: race.json"):
        assert said in found.stdout
    record = read_json(Path("race.json"), TrafficContestRecord)
    (mine,), (context,) = record["workloads"], record["sweeps"]
    names = ["out:pruned", "other"]
    assert [one["name"] for one in mine["variants"]] == names == [one["name"] for one in context["variants"]]
    same = asked(report, "race.json", "--against", "race.json")
    assert same.exit_code == 0 and "mine: TTFT" in same.stdout and "worse" not in same.stdout
    (compared,) = mine["comparisons"]
    assert (compared["variant"], compared["baseline"]) == ("other", "out:pruned")
    assert compared["tpot_speedup"]["low"] <= compared["tpot_speedup"]["p50"]
    assert compared["tpot_speedup"]["confidence"] > 0.95
    replacing = ("--workload", "mine.toml", "--threads", "1", "--out", "race.json", "--force", "--json")
    again = asked(benchmark, "other", "other", *replacing)
    assert again.exit_code == 0, again.output
    record = json.loads(again.stdout)
    assert record["tool"].startswith("nirvana-deploy ") and record["sweeps"] == []
    assert [one["name"] for one in record["workloads"][0]["variants"]] == ["other", "other (2)"]


def test_a_workload_of_contenders_is_refused_before_any_work(places: Path) -> None:
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        needs(module)
    with pytest.raises(NirvanaError, match=r"rag: prompt_tokens = 1536 .* make 1600 tokens, .* context is"):
        benchmark_contenders(["out:pruned", "other"], asked=Traffic(workloads=("rag",)))
    Path("mine.toml").write_text("prompt_tokens = 4\nnew_tokens = 3\nconcurrency = 2\nrequests = 12\n")
    engine = Path("out.engine")
    engine.write_bytes(b"")
    said = r"mine has concurrency = 2, so .* a server, and pruned cannot be: .*\.engine is an engine file"
    (workload,) = load_workloads(["mine.toml"])
    with pytest.raises(NirvanaError, match=said):
        require_served([workload], [Contender("other", Path("other"), ""), Contender("pruned", engine, "")])
    for file in Path("out/onnx").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(NirvanaError, match=r"and out:pruned cannot be: No tokenizer lies in"):
        benchmark_contenders(["out:pruned", "other"], asked=Traffic(workloads=("mine.toml",)))


def test_a_contender_that_fails_stands_in_the_table_and_the_exit_code_is_3(places: Path) -> None:
    (places / "other" / "model.onnx").write_bytes(b"no graph")
    found = asked(benchmark, "out:pruned", "other", *SHORT)
    assert found.exception.exit_code == 3  # type: ignore[attr-defined]
    table = [line.split("\t") for line in found.stdout.splitlines() if "\t" in line]
    assert ["other", "failed"] in [row[:2] for row in table]
    assert table[-1][:2] == ["other", "onnxruntime-cpu"] and "cannot be loaded" in table[-1][2]
    assert "out:pruned" in [row[0] for row in table]


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (["out", "outt"], r"outt does not exist\. Did you mean out\?", "OUT:pruned"),
        (["out:prunned"], r"Unknown model of out 'prunned'\. Did you mean 'pruned'\?", None),
        (["other:pruned"], r"other is not an output folder, so it has no model called 'pruned'", "other"),
        (["out", "out/dense"], "out/dense is nothing that can be timed", "nirvana-deploy export"),
        (["out/onnx/model.onnx", "out"], "is the graph alone", "Name out/onnx"),
        (["out", "other", "--repeats", "1"], "1 measured round tells no difference", "--precision"),
    ],
)
def test_what_cannot_be_timed_is_refused_with_the_next_command(
    places: Path, words: list[str], said: str, hint: str | None
) -> None:
    found = asked(benchmark, *words, *(SHORT if "--repeats" not in words else ()))
    assert isinstance(found.exception, NirvanaError), found.output
    with pytest.raises(NirvanaError, match=said):
        raise found.exception
    assert hint is None or hint in str(found.exception.hint)


def test_a_file_that_was_changed_since_the_manifest_is_named(places: Path) -> None:
    (places / "out" / "onnx" / "model.onnx.data").write_bytes(b"changed")
    with pytest.raises(NirvanaError, match=r"out is not timed: onnx/model\.onnx\.data is not the file that"):
        benchmark_contenders(["out:dense", "out:pruned"], WORKLOAD)


def test_an_artifact_of_another_model_is_not_timed(places: Path) -> None:
    config = json.loads((places / "other" / "config.json").read_text())
    (places / "other" / "config.json").write_text(json.dumps({**config, "vocab_size": 273}))
    with pytest.raises(NirvanaError, match="Not the same model: out:pruned has a vocabulary of 272 tokens"):
        benchmark_contenders(["out:pruned", "other"], WORKLOAD)


def test_a_file_of_somebody_else_is_never_replaced(places: Path) -> None:
    for content in ("Notes.", '{"schema": 1, "variants": []}'):
        (places / "mine.json").write_text(content)
        with pytest.raises(NirvanaError, match="is not replaced, with --force or without"):
            benchmark_contenders(["out:pruned", "other"], WORKLOAD, out="mine.json", force=True)
        assert (places / "mine.json").read_text() == content


def test_one_output_folder_keeps_its_own_record(places: Path) -> None:
    found = asked(benchmark, "out", "--out", "race.json")
    assert found.exit_code == 2 and "go with several contenders" in found.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("out", "other", "--fresh-ceilings"), "--fresh-ceilings goes with one output folder"),
        (("out", "other", "--profile"), "--profile goes with one output folder"),
        (("out", "other", "--workload", "chat", "--repeats", "3"), "--repeats says what the file of a"),
        (("out", "other", "--sweep", "batch=1,2", "--precision", "3%"), "--precision is about one request"),
        (("out", "--workload", "chat", "--profile"), "--profile is about one request"),
        (("out", "--sweep", "batch=1,2", "--fresh-ceilings"), "--fresh-ceilings is about one request"),
        (("out", "--sweep", "batch=1,2", "--precision", "3%"), "--precision is about one request"),
        (("out", "--workload", "chat", "--repeats", "3"), "--repeats says what the file of a workload says"),
        *(
            (("drafted", *option), f"{option[0]} is not for a model with its draft")
            for option in (
                ("--out", "race.json"),
                ("--force",),
                ("--repeats", "3"),
                ("--runtime", "onnxruntime-cpu"),
                ("--workload", "chat"),
                ("--profile",),
                ("--wait-until-idle",),
            )
        ),
    ],
)
def test_an_option_without_a_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in (
        "out/manifest.json",
        "other/model.onnx",
        "drafted/genai_config.json",
        "drafted/draft/model.onnx",
    ):
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    found = asked(benchmark, *words)
    assert found.exit_code == 2 and said in " ".join(found.stderr.split()), found.output


def test_against_takes_folders_and_files_and_exits_with_4(tmp_path: Path) -> None:
    old = write_records(tmp_path / "old", frozen_records())
    slow = frozen_records()
    assert slow.benchmark is not None
    cut = slow.benchmark["variants"][1]["tpot_ms"]
    cut["samples"] = [1.5 * one for one in cut["samples"]]
    now = write_records(tmp_path / "now", slow)
    assert not compare_with_earlier(old, old / "benchmark.json").worse
    found = asked(report, now, "--against", old)
    assert found.exception.exit_code == 4  # type: ignore[attr-defined]
    assert [row.split("\t")[:2] for row in found.stdout.splitlines() if row.endswith("worse")] == [
        ["pruned", "TPOT"]
    ]
    result = asked(report, now, "--against", old, "--json")
    assert json.loads(result.stdout)["worse"] == 1 and result.exit_code == 1
    assert asked(report, now, "--against", old, "--tolerance", "60%").exit_code == 0
    assert not (now / "report.html").exists()
    (old / "benchmark.json").unlink()
    assert {one.measure.split(":")[0] for one in compare_with_earlier(now, old).changes} >= {"chat"}
    (old / "workloads.json").unlink()
    with pytest.raises(NirvanaError, match=r"old was not measured\.\nMeasure it: nirvana-deploy benchmark"):
        compare_with_earlier(now, old)
    wrong = asked(report, now, old, "--against", old)
    assert wrong.exit_code == 2 and "--against compares one OUT" in wrong.stderr
