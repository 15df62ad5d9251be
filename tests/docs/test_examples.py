"""The scripts of the documentation run, and what they make is as the published schemas say."""

from __future__ import annotations

import copy
import importlib
import json
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.documents import SITE, blocks
from builders.extras import EXTRAS, needs
from builders.jobs import SHORT_ROUNDS
from builders.scripts import ROOT
from builders.tiny import INTERRUPTIBLE, write_tiny

import nirvana_deploy
from nirvana_deploy.engine.recipe import EngineBuild, EngineForm, Lengths
from nirvana_deploy.measure.recipe import Evaluation
from nirvana_deploy.pipeline.folder import build_engines, evaluate_folder
from nirvana_deploy.pipeline.prune_export import Deployment
from nirvana_deploy.prune.plan_file import read_plan
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.text import load_text_side, stream_text

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the genai bindings while they load
]
SHORT: dict[str, Any] = {
    "num_sequences": 4,
    "seq_len": 16,
    "heldout_sequences": 3,
    "heldout_len": 24,
    "round_to": 4,
    "threads": 1,
    **SHORT_ROUNDS,
}
ROOMS = "nirvana_deploy/README.md"
RESULTS = ROOT / "benchmarks" / "results"
FROZEN = ROOT / "tests" / "report" / "data"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "examples" / f"{name}.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama-tied"))


@pytest.fixture(scope="module")
def first(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first example makes."""
    out = tmp_path_factory.mktemp("examples") / "first"
    example("first_model")["main"](model, str(out), **{**SHORT, "sparsity": 0.3})
    return out


@pytest.fixture(scope="module")
def searched(model: str, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the second example makes."""
    out = tmp_path_factory.mktemp("examples") / "search"
    options = {**SHORT, "run_benchmark": False}
    example("own_data")["main"](model, str(text), str(out), **options)
    return out


@pytest.fixture(scope="module")
def schemas() -> Iterator[Any]:
    """The module that makes the schemas; its page needs Sphinx."""
    needs("sphinx")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module("generators.schemas")


def held(schemas: Any, name: str, file: Path) -> Any:
    """A JSON file that the schema ``name`` takes."""
    content = json.loads(file.read_text(encoding="utf-8"))
    needs("jsonschema").validate(content, schemas.schema_of(name))
    return content


def test_the_first_model_is_made_and_reported(first: Path) -> None:
    assert "<h2" in (first / "report.html").read_text(encoding="utf-8")
    assert (first / "onnx-w4" / "model.onnx").is_file()


def test_the_search_recommends_within_its_budget(searched: Path) -> None:
    record = json.loads((searched / "search.json").read_text(encoding="utf-8"))
    assert record["target"] == {"max_kl": 0.2} and record["recommended"] in {
        one["name"] for one in record["points"] if one["kl"] <= 0.2
    }


def test_a_server_is_asked_by_the_third_example(first: Path) -> None:
    for module in ("fastapi", "uvicorn", "prometheus_client", "openai"):
        needs(module)
    from builders.serving import served

    with served(first / "onnx") as server:
        found = "".join(example("ask")["continuation"](server.url, "Once upon", max_tokens=6))
    tokenizer, stops = load_text_side(first / "onnx")
    with open_runner(first / "onnx") as runner:
        wanted = stream_text(runner, tokenizer, "Once upon", max_new_tokens=6, stops=stops)
    assert wanted.new_tokens and found == wanted.text


def test_the_fourth_example_serves_what_the_report_recommends(model: str, first: Path) -> None:
    for module in ("fastapi", "uvicorn", "prometheus_client", "openai"):
        needs(module)
    options = {**SHORT, "sparsity": 0.3, "out": str(first), "port": 0}
    file = str(ROOT / "docs" / "examples" / "serve_model.py")
    script = f"{INTERRUPTIBLE}import runpy; runpy.run_path({file!r})['main']({model!r}, **{options!r})"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True)
    try:
        assert child.stdout is not None
        said = next((line for line in child.stdout if " on http" in line), "")
        name, _, url = said.strip().rpartition(" on ")
        assert name, child.communicate()[1]
        assert name.startswith("first/") and "".join(
            example("ask")["continuation"](f"{url.removesuffix('/v1')}/v1", "Once upon", max_tokens=3)
        )
        child.send_signal(signal.SIGINT)
        told, _ = child.communicate(timeout=60)
        assert child.returncode == 0 and "Ended after 1 answers." in told
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("page", [page for page in (*SITE, ROOMS) if blocks(page, "python")])
def test_snippets_run(
    page: str, first: Path, text: Path, schemas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On what the first example makes, under the names of the pages."""
    for name in ("first", "smollm2-s0.2", "smollm2-s0.4", "last-week"):
        (tmp_path / name).symlink_to(first)
    (tmp_path / "tickets.txt").write_text(text.read_text()[:1200])
    (tmp_path / "mine.toml").write_text("prompt_tokens = 8\nnew_tokens = 4\nrequests = 4\n")
    schemas.write_schemas(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nirvana_deploy, "prune_export", lambda *_, **__: made_in(first))
    if page == "docs/runtimes/openvino.md":
        needs("openvino_genai")
        nirvana_deploy.package_openvino(first, force=True)
    for source in blocks(page, "python"):
        for package in EXTRAS.keys() & {*re.findall(r"^import (\w+)", source, re.MULTILINE)}:
            needs(package)
        exec(compile(source, page, "exec"), {})


def made_in(out: Path) -> Deployment:
    """What prune_export returned when it made ``out``."""
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return Deployment(out, read_plan(out / "plan.json"), manifest, None, out / "report.html")


def test_files_of_a_folder_are_as_the_schemas_say(first: Path, schemas: Any) -> None:
    evaluate_folder(first, Evaluation(ntk=True, ntk_windows=2))
    for name in ("manifest", "plan", "quality", "answers", "benchmark", "ntk"):
        held(schemas, name, first / f"{name}.json")
    held(schemas, "quantization", first / "onnx-w4" / "quantization.json")


def test_an_engine_is_described_as_its_schema_says(first: Path, schemas: Any) -> None:
    needs("tensorrt_rtx")
    form, build = EngineForm(), EngineBuild(target="sm86")
    (engine,) = build_engines(first, form, Lengths(max_length=64, opt_prompt=16, opt_length=32), build)
    held(schemas, "engine", engine.with_suffix(".json"))


def test_a_search_and_its_points_are_as_their_schemas_say(searched: Path, schemas: Any) -> None:
    files = sorted(searched.glob("points/*.json"))
    assert len(files) == 6
    for file in files:
        held(schemas, "point", file)
    record = held(schemas, "search", searched / "search.json")
    validate = needs("jsonschema").validate
    for name in ("verdict", "points", "next"):
        wrong = {key: value for key, value in record.items() if key != name}
        with pytest.raises(needs("jsonschema").ValidationError, match=f"'{name}' is a required property"):
            validate(wrong, schemas.schema_of("search"))


def test_recorded_files_are_as_the_schemas_say(schemas: Any) -> None:
    for name in ("manifest", "plan", "benchmark", "workloads"):
        held(schemas, name, FROZEN / f"{name}.json")
    for file in RESULTS.glob("*.benchmark.json"):
        held(schemas, "benchmark", file)
    held(schemas, "tasks", RESULTS / "zero-shot.json")


def test_a_schema_refuses_what_this_tool_refuses(schemas: Any) -> None:
    jsonschema = needs("jsonschema")
    plan = json.loads((FROZEN / "plan.json").read_text(encoding="utf-8"))
    for layer in ({"kept_groups": [True]}, {"kept_groups": "0"}, {"of_neurons": 1.5}):
        wrong = copy.deepcopy(plan)
        wrong["layers"][0] |= layer
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schemas.schema_of("plan"))
    del plan["layers"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plan, schemas.schema_of("plan"))


@pytest.mark.slow
def test_the_first_model_is_that_of_the_tutorial(tmp_path: Path) -> None:
    """As a newcomer runs it: the default model, in its own process."""
    file = ROOT / "docs" / "examples" / "first_model.py"
    done = subprocess.run(
        [sys.executable, str(file), "smollm2", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "The whole report: out/report.html" in done.stdout
