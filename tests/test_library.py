"""The library: what the command line does, as functions that explain themselves, with brief results."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import click
import numpy as np
import pytest
from builders.jobs import SHORT, SHORT_ROUNDS
from builders.tiny import write_tiny

import nirvana_deploy as library
from nirvana_deploy.base.recipe import fields_of
from nirvana_deploy.cli.main import commands
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.families import FAMILIES
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.job import CutOptions, all_fields

DOES = {
    "benchmark": ["benchmark_folder", "benchmark_contenders", "benchmark_workloads", "benchmark_speculative"],
    "build-engine": ["build_engines"],
    "doctor": ["examine_machine"],
    "evaluate": ["evaluate_folder"],
    "export": ["export_onnx"],
    "generate": ["generate_text"],
    "inspect": ["inspect_path", "read_plan", "read_engine_record"],
    "models": ["known_models", "known_families"],
    "package": [
        "package_gguf",
        "package_triton",
        "package_openvino",
        "package_engines",
        "package_speculative",
    ],
    "prune": ["prune_export", "prune_by_plan"],
    "prune-export": ["prune_export", "meet_target", "read_recipe", "run_job"],
    "quantize": ["quantize_folder", "quantize_onnx_folder"],
    "recipe": ["job_of", "recipe_toml"],
    "recover": ["recover_folder"],
    "report": ["report_folder", "compare_folders", "compare_with_earlier"],
    "search": ["search_points"],
    "select-calib": ["select_calibration"],
    "serve": ["serve_folder"],
    "verify": ["verify_folder", "verify_onnx_folder"],
}
"""Command: the functions that do the same from Python."""
FUNCTIONS = sorted({"load_checkpoint"}.union(*DOES.values()))


def test_every_command_is_a_function_too() -> None:
    assert set(DOES) == set(commands.list_commands(click.Context(commands)))
    public = {name for name in library.__all__ if inspect.isroutine(getattr(library, name))}
    assert public == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_and_gives(name: str) -> None:
    function = getattr(library, name)
    assert re.match(r"[A-Z].*\S", function.__doc__ or "")
    parameters = inspect.signature(function).parameters.values()
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters)
    returned = get_type_hints(function).get("return", Any)
    assert returned is not Any and "0x" not in str(inspect.signature(function))


@pytest.mark.parametrize("name", ["Quantization", "Search", "Target", "Traffic", "Workload"])
def test_help_of_a_recipe_names_each_option(name: str) -> None:
    kind = getattr(library, name)
    for field in fields_of(kind):
        assert f"\n{field.name}: {field.option.help}" in kind.__doc__
        assert inspect.signature(kind).parameters[field.name].annotation == field.type


def test_type_checkers_know_the_options_of_a_job() -> None:
    assert get_type_hints(CutOptions) == {field.name: field.type for field in all_fields()}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("library")
    model = write_tiny(folder / "<b>model", "llama-tied")
    few = {**SHORT, **SHORT_ROUNDS, "num_sequences": 4, "seq_len": 16, "threads": 1}
    return library.prune_export(str(model), sparsity=0.3, out=folder / "out", quantize=("w4",), **few)


def one_line(result: object) -> str:
    said = repr(result)
    assert "\n" not in said and len(said) < 400, said[:1000]
    return said


@pytest.mark.integration
def test_results_are_a_line_in_a_terminal_and_a_table_in_a_notebook(deployment: Any) -> None:
    out, plan = deployment.out, deployment.plan
    assert one_line(deployment).startswith(f"Deployment({str(out)!r}, sparsity 0.3, ")
    assert one_line(plan).startswith("PrunePlan(sparsity=0.3, ")
    check = library.verify_folder(out)
    assert check.passed and one_line(check).endswith("passed: pruned, dense, dense-w4, pruned-w4)")
    (report, *_) = check.reports.values()
    assert one_line(report).startswith("VerifyReport(passed, ")
    workload = library.Workload(**SHORT_ROUNDS, threads=1)
    timed = library.benchmark_folder(str(out), workload)
    assert one_line(timed) == "Record(dense, pruned, dense-w4, pruned-w4)" and timed["variants"][0]["tpot_ms"]
    judged = library.evaluate_folder(str(out), place=library.Place(threads=1))
    assert one_line(judged).startswith("Record(dense, pruned, ") and judged["variants"]["pruned"]["tokens"]
    inspection = library.inspect_path(str(out))
    assert "3 layers" in one_line(inspection)
    for shown, told in (
        (deployment, "Decode, per token"),
        (plan, "of 4"),
        (check, "Largest difference"),
        (timed, "Peak memory (RSS)"),
        (judged, "KL vs dense, nats"),
        (inspection, "FFN neurons"),
    ):
        html = shown._repr_html_()
        assert told in html and html.count("<table>") == 1 and "<b>" not in html and len(html) < 20_000
    job = library.read_recipe(out / "recipe.toml")
    assert "sparsity=0.3" in one_line(job) and "micro_batch" not in repr(job)
    assert "&lt;b&gt;model" in job._repr_html_()
    with Run.open(out) as run:
        assert one_line(run).startswith(f"Run({str(out)!r}, stages: calibrate, ")
    checkpoint = Checkpoint.open(out / "checkpoint")
    assert re.search(r"llama, 3 layers, [\d,]+ parameters\)$", one_line(checkpoint))
    for family in FAMILIES.values():
        one_line(family)


@pytest.mark.integration
def test_what_stands_alone_is_made_and_runs(deployment: Any, tmp_path: Path) -> None:
    """An ONNX folder of the checkpoint computes what that of the job computes; an answer is the same."""
    graph = library.Graph(last_logits=True)
    made = library.export_onnx(str(deployment.out / "checkpoint"), tmp_path / "onnx", graph)
    assert one_line(made).startswith(f"OnnxFolder({str(tmp_path / 'onnx')!r}, ")
    assert library.verify_onnx_folder(tmp_path / "onnx", model=str(deployment.out / "checkpoint")).passed
    heard: list[str] = []
    place = library.Place(threads=1)
    answers = [
        library.generate_text(
            path, "one two", max_new_tokens=8, variant=variant, place=place, on_text=heard.append
        )
        for path, variant in ((tmp_path / "onnx", None), (deployment.out, "pruned"))
    ]
    assert answers[0].text == answers[1].text and "".join(heard) == 2 * answers[0].text
    recipe = library.Quantization(scheme="w8")
    quantized = library.quantize_onnx_folder(tmp_path / "onnx", str(tmp_path / "w8"), recipe)
    assert one_line(quantized).startswith("QuantizedFolder(")
    with pytest.raises(library.NirvanaError, match="exists already"):
        library.quantize_onnx_folder(tmp_path / "onnx", tmp_path / "w8", recipe)


@pytest.mark.integration
def test_candidates_are_ranked(tiny_llama: Path, text: Path) -> None:
    tried = library.Selection(
        sparsity=0.3, corpora=str(text), candidates=2, gammas="1,M/A", num_sequences=4, seq_len=16,
        heldout_sequences=4, heldout_len=16,
    )  # fmt: skip
    found = library.select_calibration(str(tiny_llama), tried)
    kls = np.array([one.kl for one in found.candidates])
    assert len(kls) == 4 and found.winner == kls.argmin()
    assert one_line(found) == f"Selection({found.verdict})" and found._repr_html_().count("<tr>") == 5
    with pytest.raises(library.NirvanaError, match="'much' is neither a number nor M/A"):
        library.select_calibration(str(tiny_llama), library.Selection(sparsity=0.3, gammas="much"))
    for change, complaint in (
        ({"allocation": "curves", "gammas": "1"}, "and so do the curves"),
        ({"saliencies": "refit"}, "compares the units of a layer"),
    ):
        with pytest.raises(library.NirvanaError, match=complaint):
            library.select_calibration(str(tiny_llama), library.Selection(sparsity=0.3, **change))


@pytest.mark.integration
def test_candidates_are_ranked_with_the_refit_applied(tiny_llama: Path, text: Path) -> None:
    plain = library.Selection(
        sparsity=0.3, corpora=str(text), candidates=1, num_sequences=4, seq_len=16, round_to=4,
        heldout_sequences=4, heldout_len=16,
    )  # fmt: skip
    refitted = replace(plain, reconstruct=True)
    inside = replace(refitted, saliencies="refit", allocation="curves")
    found = [library.select_calibration(str(tiny_llama), one) for one in (plain, refitted, inside)]
    assert [one.plan.reconstruct is not None for one in found] == [False, True, True]
    assert found[0].plan.kept_groups == found[1].plan.kept_groups
    assert found[0].candidates[0].kl != found[1].candidates[0].kl
    assert found[2].plan.saliency == "refit"


def test_lists_of_what_is_known_are_copies() -> None:
    assert library.known_models()["smollm2"].supported
    library.known_models().clear()
    library.known_families().clear()
    assert library.known_models() and library.known_families()
