"""A search on a tiny model: its points, what is shared, and that each is what its recipe makes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from builders.jobs import SHORT, SHORT_ROUNDS
from builders.tiny import write_tiny
from click.testing import CliRunner

from nirvana_deploy.base.errors import NirvanaError, QualityError, VerificationError
from nirvana_deploy.base.progress import SILENT
from nirvana_deploy.cli.main import commands
from nirvana_deploy.pipeline.job import job_of
from nirvana_deploy.pipeline.prune_export import run_job
from nirvana_deploy.pipeline.recipe_file import read_recipe
from nirvana_deploy.pipeline.searching import cuts as cutting
from nirvana_deploy.pipeline.searching import search as searching
from nirvana_deploy.pipeline.searching.cuts import cuts_of, tried_options
from nirvana_deploy.pipeline.searching.search import Searched, search_points
from nirvana_deploy.quantize import stage as quantizing
from nirvana_deploy.search.point import Point
from nirvana_deploy.search.recipe import Search, Target
from nirvana_deploy.search.ways import ways_of
from nirvana_deploy.verify import stage as verifying

pytestmark = pytest.mark.integration
OPTIONS: dict[str, Any] = {
    **SHORT,
    **SHORT_ROUNDS,
    "num_sequences": 4,
    "seq_len": 16,
    "threads": 1,
    "round_to": 4,
    "gamma": 1.0,
}
RECIPE = Search(sparsities="0,0.2,0.4", precisions="none,w8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama-tied"))


@pytest.fixture(scope="module")
def done(model: str, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A finished search; read-only."""
    out = tmp_path_factory.mktemp("out") / "search"
    return search_points(model, out=out, recipe=RECIPE, target=Target(max_weights_bytes=10**9), **OPTIONS)


def record_of(out: Path) -> Any:
    return json.loads((out / "search.json").read_text(encoding="utf-8"))


def untimed(record: Any) -> Any:
    """What two searches of the same points agree in."""
    points = [{k: v for k, v in one.items() if k not in TIMED} for one in record["points"]]
    return {"points": points, "recommended": record["recommended"]}


TIMED = {"tpot_ms", "speedup", "speedup_interval", "on_front"}


def test_every_point_is_measured_and_the_dense_model_is_one_of_them(done: Searched) -> None:
    names = [one.name for one in done.points]
    assert names == ["dense", "dense-w8", "s0.2", "s0.2-w8", "s0.4", "s0.4-w8"]
    assert all(one.failed is None and one.kl is not None for one in done.points)
    kl = {one.name: one.kl for one in done.points}
    assert kl["dense"] == 0 and 0 < (kl["dense-w8"] or 0) < (kl["s0.4"] or 0)
    assert done.recommendation.point is not None and done.recommendation.point.name == "dense"
    stages = json.loads((done.out / "s0.4/manifest.json").read_text())["stages"]
    first = json.loads((done.out / "s0.2/manifest.json").read_text())["stages"]
    assert stages["calibrate"]["files"] == first["calibrate"]["files"]  # taken, not drawn again
    assert (done.out / "s0.4/dense/onnx/model.onnx").samefile(done.out / "s0.2/dense/onnx/model.onnx")
    assert "dense-onnx-w8" in first and "dense-onnx-w8" not in stages
    benchmark = json.loads((done.out / "benchmark.json").read_text())
    timed = {one["name"] for one in benchmark["variants"]}
    assert "dense" in timed and timed == {one.name for one in done.points if one.tpot_ms is not None}


def test_the_page_says_which_point_to_take_and_shows_all(done: Searched) -> None:
    record = record_of(done.out)
    page = (done.out / "search.html").read_text(encoding="utf-8")
    assert record == json.loads(json.dumps(done.record))
    assert record["verdict"].startswith("Take dense (KL 0") and record["verdict"] in page
    assert "No cut is better under this budget: the dense model itself is." in page
    assert all(f'<th scope="row">{one.name}</th>' in page for one in done.points)
    assert page.count("<svg") == 2 and "<script" not in page
    lines = (done.out / "search.csv").read_text().splitlines()
    assert len(lines) == 7 and lines[0].startswith("name,sparsity,scheme,way,kl")


def test_a_point_is_what_its_own_recipe_makes(done: Searched, tmp_path: Path) -> None:
    """Without any folder beside: the same bytes, the same KL."""
    job = read_recipe(done.out / "s0.4/recipe.toml")
    alone = run_job(job, out=tmp_path / "alone", until="quality")
    for file in ("plan.json", "onnx/model.onnx.data", "onnx-w8/model.onnx.data"):
        assert (alone.out / file).read_bytes() == (done.out / "s0.4" / file).read_bytes()
    found = json.loads((alone.out / "quality.json").read_text())["variants"]
    kl = {one.name: one.kl for one in done.points}
    assert found["pruned"]["kl_vs_dense"] == pytest.approx(kl["s0.4"], abs=1e-6)
    assert found["pruned-w8"]["kl_vs_dense"] == pytest.approx(kl["s0.4-w8"], abs=1e-6)


def test_other_ways_to_cut_are_points_like_any_other(model: str, tmp_path: Path) -> None:
    """What they have in common is made once; each is what its recipe makes; the accuracy stands beside."""
    tasks = tmp_path / "letters.jsonl"
    rows = [{"query": f"a {n}", "choices": [" b", " c"], "gold": n % 2} for n in range(4)]
    tasks.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ways = ("ridge=10", "recover=1k")
    recipe = Search(sparsities="0,0.4", precisions="none", ways=ways, tasks=str(tasks))
    # a text from which so few tokens teach something: recovery keeps the cut where they do not
    text = "self:0.6,pydoc:0.2,code:0.2"
    best = {**OPTIONS, "preset": "best", "num_sequences": 32, "recover_text": text}
    del best["gamma"]
    found = search_points(model, out=tmp_path / "search", recipe=recipe, **best)
    assert [one.name for one in found.points] == ["dense", "s0.4", "s0.4-ridge10", "s0.4-recover1k"]
    assert all(one.failed is None for one in found.points)
    assert len({one.kl for one in found.points}) == 4, {one.name: one.kl for one in found.points}
    cut, other, trained = (found.out / one.folder for one in found.points[1:])
    matrix = min((cut / "reconstruction").glob("*.safetensors")).relative_to(cut)
    assert (cut / matrix).samefile(trained / matrix) and not (cut / matrix).samefile(other / matrix)
    assert (cut / "curves.safetensors").samefile(other / "curves.safetensors")
    alone = run_job(read_recipe(other / "recipe.toml"), out=tmp_path / "alone", until="quality")
    for file in ("plan.json", "onnx/model.onnx.data"):
        assert (alone.out / file).read_bytes() == (other / file).read_bytes()
    timed = [one for one in found.points if one.tpot_ms is not None]
    assert timed and all(one.accuracy is not None for one in timed)
    page = (found.out / "search.html").read_text(encoding="utf-8")
    assert "<b>ridge10</b> sets ridge = 10.0" in page and "Zero-shot" in page and page.count("<svg") == 3
    with pytest.raises(NirvanaError, match=r"judged on what its own text holds back\."):
        search_points(model, out=tmp_path / "x", recipe=Search(ways=("calib=code",)), **OPTIONS)


def test_the_first_cut_of_all_serves_the_first_of_each_way_and_these_the_rest(tmp_path: Path) -> None:
    base = job_of("a model", {**OPTIONS, "sparsity": 0.4})
    own, way = ways_of(["ridge=10"], tried_options())
    points = [Point(sparsity, None, way) for way in (own, way) for sparsity in (0.2, 0.4)]
    cuts = cuts_of(tmp_path, base, points, points, points[0])
    assert [(cut.folder.name, cut.turn, [one.name for one in cut.beside]) for cut in cuts] == [
        ("s0.2", 0, []),
        ("s0.4", 1, ["s0.2"]),
        ("s0.2-ridge10", 1, ["s0.2"]),
        ("s0.4-ridge10", 2, ["s0.2", "s0.2-ridge10", "s0.4"]),
    ]
    made = [(cut.job.pruning.sparsity, cut.job.pruning.ridge) for cut in cuts]
    assert made == [(0.2, 1.0), (0.4, 1.0), (0.2, 10.0), (0.4, 10.0)]
    assert [cut.job.quantization.baseline_quantized for cut in cuts] == [True, False, False, False]


_IN_A_PROCESS = """
import json, sys
from nirvana_deploy import Search, Target, search_points
out, model, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
recipe = Search(sparsities="0,0.2,0.4", precisions="none,w8")
search_points(model, out=out, recipe=recipe, target=Target(max_weights_bytes=10**9), resume=True, **options)
"""


@pytest.mark.slow
def test_a_search_killed_at_ten_moments_finds_what_an_undisturbed_one_does(
    done: Searched, model: str, tmp_path: Path
) -> None:
    """Moments are drawn anew for each try, from the first second to the time that a whole search takes."""
    out, moments, killed = tmp_path / "search", Random(0), 0
    command = [sys.executable, "-c", _IN_A_PROCESS, str(out), model, json.dumps(OPTIONS)]
    whole_s = 30.0
    while killed < 10:
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                assert process.wait(timeout=moments.uniform(1, whole_s)) == 0
                shutil.rmtree(out)  # it was done before its moment came
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
    last = subprocess.run(command, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    assert untimed(record_of(out)) == untimed(record_of(done.out))


@pytest.mark.slow
def test_parts_copied_together_are_the_whole(done: Searched, model: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    for part in (1, 2):
        out = tmp_path / f"part{part}"
        found = search_points(model, out=out, recipe=replace(RECIPE, shard=f"{part}/2"), **OPTIONS)
        assert found.page is None and not (out / "search.html").exists()
        shutil.copytree(out, whole, dirs_exist_ok=True)
    target = Target(max_weights_bytes=10**9)
    again = search_points(model, out=whole, recipe=RECIPE, target=target, resume=True, **OPTIONS)
    assert untimed(record_of(again.out))["recommended"] == "dense"
    kls = [(one.name, one.kl, one.weights_bytes) for one in again.points]
    assert kls == [(one.name, one.kl, one.weights_bytes) for one in done.points]


def test_parts_say_what_they_are_and_those_of_two_searches_are_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cut fails here; together the parts try them again."""

    def refused(*_: Any, **__: Any) -> None:
        raise NirvanaError("There is no memory for it.")

    def copied(*names: str) -> Path:
        out = tmp_path / "-".join(names)
        for name in names:
            shutil.copytree(tmp_path / name, out, dirs_exist_ok=True)
        return out

    monkeypatch.setattr(cutting, "run_job", refused)
    for name, shard, seed in (("one", "1/2", 0), ("two", "2/2", 0), ("again", "2/2", 0), ("other", "2/2", 1)):
        part = replace(RECIPE, shard=shard)
        search_points(model, out=tmp_path / name, recipe=part, **{**OPTIONS, "seed": seed})
    whole = copied("one", "two")
    assert len(list((whole / "parts").iterdir())) == 2 and len(list((whole / "points").iterdir())) == 6
    with pytest.raises(NirvanaError, match=r"Every point failed\. The first: There is no memory"):
        search_points(model, out=whole, recipe=RECIPE, resume=True, **OPTIONS)
    with pytest.raises(NirvanaError, match=r"parts/1-of-2-\S+ of tiny and parts/2-of-2-\S+ of tiny.* seed, "):
        search_points(model, out=copied("one", "other"), recipe=RECIPE, resume=True, **OPTIONS)
    with pytest.raises(NirvanaError, match=r"parts/2-of-2-\S+ and parts/2-of-2-\S+ both made s0\.4"):
        search_points(model, out=copied("two", "again"), recipe=RECIPE, resume=True, **OPTIONS)


def test_a_killed_search_goes_on_and_a_point_that_fails_is_kept_with_its_reason(
    done: Searched, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "search"
    shutil.copytree(done.out, out)
    shutil.rmtree(out / "s0.4")
    (out / "search.json").unlink()

    def refused(job: Any, **_: Any) -> None:
        raise NirvanaError(f"{job.pruning.sparsity:g} is too much.")

    options = {"recipe": RECIPE, "target": Target(max_weights_bytes=10**9), "resume": True, **OPTIONS}
    with monkeypatch.context() as patch:
        patch.setattr(cutting, "run_job", refused)
        search_points(model, out=out, **options)
    failed = {one["name"]: one["failed"] for one in record_of(out)["points"]}
    assert failed["s0.4"] == failed["s0.4-w8"] == "0.4 is too much." and failed["s0.2"] is None
    assert "failed: 0.4 is too much." in (out / "search.html").read_text()
    search_points(model, out=out, **options)  # what failed is tried again
    assert untimed(record_of(out)) == untimed(record_of(done.out))


def test_a_model_that_fails_its_verification_takes_no_other_with_it(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured and recommended only where no other meets the budget: then the exit code is 3."""
    out = tmp_path / "search"
    how: dict[str, Any] = {"out": out, "recipe": RECIPE, **OPTIONS, "run_benchmark": False}
    real = quantizing.quantize_onnx

    def quantized(source: Path, folder: Path, *arguments: Any, **keywords: Any) -> Any:
        made = real(source, folder, *arguments, **keywords)
        if folder == out / "s0.2/onnx-w8":
            raise VerificationError("13 of 14 linears are stored in 8 bits.")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "quantize_onnx", quantized)
        found = search_points(model, **how)
        points = {one.name: one for one in found.points}
        assert all(one.failed is None and one.kl is not None for one in found.points)
        assert {name for name, one in points.items() if one.unverified} == {"s0.2-w8"}
        assert "not verified: 13 of 14 linears" in (out / "search.html").read_text(encoding="utf-8")
        assert not {one["name"]: one for one in record_of(out)["points"]}["s0.2-w8"]["on_front"]
        worse = points["s0.2-w8"]
        target = Target(max_kl=(worse.kl or 0) * 1.01, max_weights_bytes=worse.weights_bytes)
        with pytest.raises(VerificationError, match=r"No verified point .*s0\.2-w8 failed: 13 of") as refused:
            search_points(model, target=target, resume=True, **how)
        assert refused.value.exit_code == 3
        assert record_of(out)["recommended"] == "s0.2-w8" and "It failed its" in record_of(out)["verdict"]
    again = search_points(model, target=target, resume=True, **how)  # it is made again
    assert again.recommendation.point is not None
    assert (again.recommendation.point.name, again.recommendation.point.unverified) == ("s0.2-w8", None)


def test_the_dense_model_is_taken_from_the_next_cut_where_the_first_fails(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "search", verifying.verify_onnx

    def verified(checkpoint: Path, folder: Path, **keywords: Any) -> Any:
        report = real(checkpoint, folder, **keywords)
        if folder != out / "s0.2/onnx":
            return report
        return replace(report, checks=(replace(report.checks[0], passed=False), *report.checks[1:]))

    monkeypatch.setattr(verifying, "verify_onnx", verified)
    found = search_points(model, out=out, recipe=RECIPE, **OPTIONS, run_benchmark=False)
    points = {one.name: one for one in found.points}
    assert {name for name, one in points.items() if one.failed} == {"s0.2", "s0.2-w8"}
    assert "logits differ" in (points["s0.2-w8"].failed or "")
    assert points["dense"].folder == points["dense-w8"].folder == "s0.4"
    assert points["dense"].kl == 0 and (points["dense-w8"].kl or 0) > 0


def test_what_a_cut_says_is_written_when_it_is_through(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cutting.run_job

    def killed(job: Any, **keywords: Any) -> Any:
        if job.pruning.sparsity == 0.4:
            raise KeyboardInterrupt
        return real(job, **keywords)

    monkeypatch.setattr(cutting, "run_job", killed)
    with pytest.raises(KeyboardInterrupt):
        search_points(model, out=tmp_path / "search", recipe=RECIPE, **OPTIONS)
    written = [json.loads(file.read_text()) for file in (tmp_path / "search/points").iterdir()]
    assert {one["name"] for one in written} == {"dense", "dense-w8", "s0.2", "s0.2-w8"}
    assert all(one["kl"] is not None for one in written)


def test_force_starts_again_with_the_same_options_and_with_others(
    done: Searched, model: str, tmp_path: Path
) -> None:
    """Nothing of the search before is believed: neither its points nor its cuts."""
    out, recipe = tmp_path / "search", Search(sparsities="0,0.2", precisions="none")
    shutil.copytree(done.out, out)
    for file in (out / "points").iterdir():
        file.write_text(json.dumps(json.loads(file.read_text()) | {"kl": 99.0}))
    options = {**OPTIONS, "run_benchmark": False}
    for again in (options, {**options, "seed": 1}):
        before = json.loads((out / "s0.2/manifest.json").read_text())["run"]
        found = search_points(model, out=out, recipe=recipe, force=True, **again)
        assert all(one.failed is None and (one.kl or 0) < 99 for one in found.points)
        assert json.loads((out / "s0.2/manifest.json").read_text())["run"] != before
        assert len(list((out / "points").iterdir())) == len(found.points) == 2


def test_what_a_search_made_anew_takes_from_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s0.4 of a search before stands there, and its turn is that of the first of another way."""
    base = job_of("a model", {**OPTIONS, "sparsity": 0.4})
    own, way = ways_of(["ridge=10"], tried_options())
    points = [Point(0.2, None, own), Point(0.4, None, own), Point(0.4, None, way)]
    for name in ("s0.2", "s0.4", "s0.4-ridge10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    asked: dict[str, tuple[list[str], bool, bool]] = {}

    def made(job: Any, *, out: Path, beside: list[Path], resume: bool, force: bool, **_: Any) -> None:
        asked[out.name] = ([one.name for one in beside], resume, force)

    monkeypatch.setattr(cutting, "run_job", made)
    cuts = cuts_of(tmp_path, base, points, points, points[0])
    list(cutting.make_cuts(cuts, Search(), SILENT, anew=True))
    assert asked == {
        "s0.2": ([], False, True),
        "s0.4": (["s0.2"], False, True),
        "s0.4-ridge10": (["s0.2"], False, True),
    }
    list(cutting.make_cuts(cuts, Search(), SILENT))
    assert asked["s0.4-ridge10"] == (["s0.2", "s0.4"], True, False)


def test_a_refusal_behind_the_cuts_leaves_them_and_resume_goes_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, recipe = tmp_path / "search", Search(sparsities="0,0.2", precisions="none")

    def refused(*_: Any, **__: Any) -> None:
        raise NirvanaError("There is no memory for it.")

    with monkeypatch.context() as patch:
        patch.setattr(searching, "timed_points", refused)
        with pytest.raises(NirvanaError, match="no memory"):
            search_points(model, out=out, recipe=recipe, **OPTIONS)
    assert len(list((out / "points").iterdir())) == 2
    monkeypatch.setattr(cutting, "run_job", refused)  # none is made again
    again = search_points(model, out=out, recipe=recipe, resume=True, **OPTIONS)
    assert all(one.failed is None and one.tpot_ms is not None for one in again.points)


def test_a_search_whose_cuts_all_fail_leaves_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise NirvanaError("There is no memory for it.")

    monkeypatch.setattr(cutting, "run_job", refused)
    with pytest.raises(NirvanaError, match=r"Every point failed\. The first: There is no memory"):
        search_points(model, out=tmp_path / "search", recipe=RECIPE, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_bf16_is_searched_by_quality_and_size(model: str, tmp_path: Path) -> None:
    recipe = Search(sparsities="0,0.2", precisions="none")
    found = search_points(model, out=tmp_path / "search", recipe=recipe, **{**OPTIONS, "dtype": "bf16"})
    assert all(one.failed is None and one.tpot_ms is None for one in found.points)
    assert found.page is not None and found.page.is_file()


def test_a_required_quality_is_asked_of_what_is_recommended(model: str, tmp_path: Path) -> None:
    out, recipe = tmp_path / "search", Search(sparsities="0,0.4", precisions="none")
    how: dict[str, Any] = {"recipe": recipe, "require_kl": 1e-9, **OPTIONS, "run_benchmark": False}
    found = search_points(model, out=out, **how)  # the dense model
    assert all(one.failed is None and one.kl is not None for one in found.points)
    size = min(one.weights_bytes or 0 for one in found.points)
    with pytest.raises(QualityError, match=r"KL of pruned is .*, required at most 1e-09"):
        search_points(model, out=out, target=Target(max_weights_bytes=size), resume=True, **how)
    assert record_of(out)["recommended"] == "s0.4"


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (Search(sparsities="0.2", precisions="none,w8"), {}),
        (Search(sparsities="0,0.2", precisions="w8"), {}),
        (Search(sparsities="0,0.2", precisions="none"), {"run_benchmark": False}),
        (Search(sparsities="0,0.2", precisions="none"), {"dtype": "bf16"}),
    ],
)
def test_a_limit_on_time_is_refused_where_nothing_is_timed(
    recipe: Search, options: dict[str, Any], model: str, tmp_path: Path
) -> None:
    for target in (Target(target_tpot_ms=5.0), Target(min_speedup=1.2, max_kl=0.1)):
        with pytest.raises(NirvanaError, match="A limit on time needs"):
            search_points(model, out=tmp_path / "out", recipe=recipe, target=target, **{**OPTIONS, **options})
    assert not list(tmp_path.iterdir())


def test_a_search_without_the_dense_model_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match="compares with the dense model, and --no-baseline"):
        search_points(model, out=tmp_path / "out", recipe=RECIPE, baseline=False, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_what_does_not_belong_together_is_refused(done: Searched, model: str) -> None:
    with pytest.raises(NirvanaError, match=r"cannot be resumed: .*seed 0, not 1"):
        search_points(model, out=done.out, recipe=RECIPE, resume=True, **{**OPTIONS, "seed": 1})
    with pytest.raises(NirvanaError, match="exists already"):
        search_points(model, out=done.out, recipe=RECIPE, **OPTIONS)
    with pytest.raises(NirvanaError, match="not the option 'sparsity'"):
        search_points(model, out=done.out, sparsity=0.2, **OPTIONS)


def test_the_command_knows_its_options() -> None:
    shown = CliRunner().invoke(commands, ["search", "--help"])
    assert "--max-kl" in shown.output and "nirvana-deploy search smollm2 --max-kl 0.2" in shown.output
    refused = CliRunner().invoke(commands, ["search", "smollm2", "--sparsity", "0"])
    assert isinstance(refused.exception, NirvanaError) and "cuts nothing" in refused.exception.message
