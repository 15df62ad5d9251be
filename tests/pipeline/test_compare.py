"""``report --compare``: finished folders alone are compared, and the page takes nobody's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.reports import frozen_records, with_models, write_records
from click.testing import CliRunner

from nirvana_deploy import compare_folders
from nirvana_deploy.base.errors import NirvanaError, upgrade
from nirvana_deploy.cli.report import report
from nirvana_deploy.pipeline.compare import write_comparison

MODELS = {"pruned": (1.5, 380.0, 0.05), "pruned-w4": (2.0, 90.0, 0.08)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    one = write_records(tmp_path / "one", with_models(MODELS))
    other = write_records(tmp_path / "other", with_models({"pruned": (1.2, 410.0, 0.03)}))
    return one, other


def asked(*words: Any) -> Any:
    return CliRunner().invoke(report, [str(word) for word in words])


def test_a_terminal_gets_a_table_and_ends_with_the_one_to_take(pair: tuple[Path, Path]) -> None:
    found = asked("--compare", *pair)
    assert found.exit_code == 0, found.output
    assert found.stdout.rstrip().splitlines()[-1].startswith("Take one: pruned-w4. one: pruned-w4 is 2.00")
    assert {"one", "other", "dense", "pruned", "take"} <= set(found.stdout.split())


def test_json_has_the_same_numbers(pair: tuple[Path, Path]) -> None:
    found = json.loads(asked("--compare", *pair, "--json").stdout)
    assert found["schema"] == 1 and found["level"] == "ship"
    assert found["take"] == [{"folder": "one", "variant": "pruned-w4"}]
    assert [(row["folder"], row["variant"], row["speedup"]) for row in found["rows"]] == [
        ("one", "dense", None),
        ("one", "pruned", 1.5),
        ("one", "pruned-w4", 2.0),
        ("other", "dense", None),
        ("other", "pruned", 1.2),
    ]


@pytest.mark.parametrize("name", ["compared.html", "compared.md"])
def test_a_page_is_written_where_asked_and_replaced_with_force_alone(
    pair: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    page = tmp_path / name
    assert asked("--compare", *pair, "--out", page).stdout.count(f"Page: {page}") == 1
    first = page.read_bytes()
    assert b"Take one: pruned-w4" in first and first.startswith(b"<")
    comparison = compare_folders(pair)
    with pytest.raises(NirvanaError, match="exists already"):
        write_comparison(comparison, page, reads=pair)
    write_comparison(comparison, page, reads=pair, force=True)
    assert page.read_bytes() == first
    page.write_text("Somebody's notes.")
    with pytest.raises(NirvanaError, match="is not replaced, with --force or without"):
        write_comparison(comparison, page, reads=pair, force=True)
    assert page.read_text() == "Somebody's notes."


def test_two_folders_of_one_name_get_more_of_their_paths(tmp_path: Path) -> None:
    outs = []
    for model in ("a", "b"):
        (tmp_path / model).mkdir()
        outs.append(write_records(tmp_path / model / "out", with_models(MODELS)))
    assert {row.folder for row in compare_folders(outs).rows} == {"a/out", "b/out"}


def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(out: Path) -> None:
        record = json.loads((out / f"{name}.json").read_text())
        change(record)
        (out / f"{name}.json").write_text(json.dumps(record))

    return apply


def half_written(out: Path) -> None:
    whole = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("damage", "said", "hint"),
    [
        (lambda out: (out / "manifest.json").unlink(), "it has no manifest.json", "prune-export MODEL"),
        (
            changed("manifest", lambda m: m.update(tool="other 1.0")),
            "its tool is 'other 1.0'",
            "prune-export",
        ),
        (
            changed("manifest", lambda m: m.update(complete=False)),
            "the last stage is speculative",
            "--resume --out",
        ),
        (changed("manifest", lambda m: m["stages"].clear()), "no stage is finished", "--resume --out"),
        (changed("manifest", lambda m: m["stages"].pop("onnx")), "no ONNX model", "--resume --out"),
        (changed("manifest", lambda m: m["stages"]["plan"].update(run="x")), "more than one run", "--resume"),
        (changed("manifest", lambda m: m.update(schema=2)), "manifest.json has schema 2", upgrade()),
        (changed("benchmark", lambda b: b.update(schema=2)), "benchmark.json has schema 2", upgrade()),
        (changed("plan", lambda p: p.pop("layers")), "plan.json", None),
        (half_written, "manifest.json", None),
        (lambda out: (out / "benchmark.json").unlink(), "was not measured", "nirvana-deploy benchmark"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_folder_that_is_not_finished_is_refused_with_the_next_command(
    pair: tuple[Path, Path], damage: Callable[[Path], Any], said: str, hint: str | None
) -> None:
    damage(pair[1])
    with pytest.raises(NirvanaError) as refused:
        compare_folders(pair)
    assert str(pair[1]) in str(refused.value) and said in str(refused.value)
    assert hint is None or hint in str(refused.value.hint)


def test_fewer_than_two_and_one_twice_are_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(NirvanaError, match="takes two folders or more"):
        compare_folders(pair[:1])
    with pytest.raises(NirvanaError, match="named twice"):
        compare_folders([pair[0], pair[0].parent / "other/../one"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "x.html"), "go with --compare"),
        (("--compare", "--out", "x.pdf"), "ends in neither .html nor .md"),
        ((), "add --compare to set them side by side"),
    ],
)
def test_options_that_do_not_go_together_are_a_usage_error(
    pair: tuple[Path, Path], words: tuple[str, ...], said: str
) -> None:
    found = asked(*pair, *words)
    assert found.exit_code == 2 and said in found.stderr


def test_the_frozen_folder_is_a_finished_one(tmp_path: Path) -> None:
    outs = [write_records(tmp_path / name, frozen_records()) for name in ("a", "b")]
    assert compare_folders(outs).title == "Take none"
