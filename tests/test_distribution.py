"""What is published: an sdist with all that its tests need, and a wheel of the package alone, which runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest
import yaml
from builders.distribution import built, source_tree, unpacked
from builders.jobs import write_short_recipe
from builders.scripts import ROOT
from builders.tiny import write_tiny
from builders.windows import package_modules

pytestmark = pytest.mark.integration

DATA = {
    "nirvana_deploy/py.typed",
    *(f"nirvana_deploy/calib_sets/{name}.toml" for name in ("bookcorpus", "c4", "lambada", "wikitext")),
    *(f"nirvana_deploy/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("calib_sets/*/*.txt")),
    *(f"nirvana_deploy/measure/workloads/{name}.toml" for name in ("batch", "chat", "edge", "rag", "server")),
    *(
        f"nirvana_deploy/{path.relative_to(ROOT / 'nirvana_deploy').as_posix()}"
        for path in ROOT.glob("nirvana_deploy/report/templates/*")
    ),
}
VERSIONS = ("3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    return built("sdist", source_tree(folder / "source"), folder / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    return built("wheel", unpacked(sdist, folder / "source"), folder / "dist")


def files_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_sdist_holds_every_file_of_the_repository(sdist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone: an unpacked sdist does not know what it should hold")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if (ROOT / name).is_file()} - held == {".gitignore"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    modules = {f"{name.replace('.', '/')}.py" for name in [*package_modules(), "nirvana_deploy.__main__"]}
    packages = {
        name.removesuffix("/__init__.py") for name in files_in(wheel) if name.endswith("/__init__.py")
    }
    held = {name.replace("/__init__.py", ".py") for name in files_in(wheel)}
    assert held == {name.replace("/__init__.py", ".py") for name in modules} | DATA
    assert {"nirvana_deploy/cli", "nirvana_deploy/calib_sets"} <= packages


def test_the_wheel_says_what_it_needs_and_is_for(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (info,) = tmp_path.glob("*.dist-info")
    told: Distribution = PathDistribution(info)
    said = [line for line in told.metadata.get_all("Classifier", []) if line.count("::") == 2]
    assert {line.rpartition(" ")[2] for line in said if " Python :: 3." in line} == set(VERSIONS)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    assert told.metadata.get_all("Project-URL") == [f"Paper, {cited[0]['url']}"]
    (command,) = told.entry_points.select(group="console_scripts")
    assert (command.name, command.value) == ("nirvana-deploy", "nirvana_deploy.cli.main:main")


def test_the_workflow_tries_what_is_promised() -> None:
    text = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert tuple(jobs["unit"]["strategy"]["matrix"]["python-version"]) == VERSIONS
    assert {"run": "bash .ci/run"} in jobs["all"]["steps"] and "Never run" in text.partition("\n")[0]
    assert "tests/test_distribution.py" in jobs["wheel"]["steps"][-1]["run"]


@pytest.mark.slow
def test_the_tests_of_an_unpacked_sdist_pass(sdist: Path, tmp_path: Path) -> None:
    """All of them are collected; some quick ones run on the sdist's own code."""
    folder = unpacked(sdist, tmp_path / "unpacked")
    pytest_there = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for words in (
        ["--collect-only"],
        ["-m", "unit", "tests/search", "tests/report", "tests/test_architecture.py"],
    ):
        done = elsewhere([*pytest_there, *words], folder, PYTHONPATH=str(folder))
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("python_version", VERSIONS)
def test_the_wheel_works_in_a_new_environment(python_version: str, wheel: Path, tmp_path: Path) -> None:
    """From another folder: every module is imported, and a tiny model goes the whole way.

    Modules of ``serve/`` import what is an extra, so that is installed with it.
    """
    python = interpreter(python_version)
    if python is None:
        pytest.skip(f"needs a Python {python_version}")
    place = tmp_path / "place"
    place.mkdir()
    recipe = write_short_recipe(
        write_tiny(place / "model", "llama-tied"),
        place / "recipe.toml",
        sparsity=0.3,
        threads=1,
        num_sequences=4,
        seq_len=16,
    )
    installed = tmp_path / "venv"
    programs = programs_of(installed)
    install = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    import_all = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    for command in (
        [str(python), "-m", "venv", str(installed)],
        [*install, "--constraint", str(ROOT / "constraints.txt"), f"{wheel}[cpu,serve]"],
        [str(programs / "python"), "-c", import_all, *package_modules()],
        [str(programs / "nirvana-deploy"), "prune-export", "--recipe", str(recipe), "--out", "out"],
    ):
        done = elsewhere(command, place)
        assert done.returncode == 0, f"{command[:4]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert (place / "out" / "report.html").is_file()


def programs_of(environment: Path) -> Path:
    return environment / ("Scripts" if os.name == "nt" else "bin")


def elsewhere(command: list[str], folder: Path, **setting: str) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder``, without this process's path to the package."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env=inherited | setting, capture_output=True, text=True, check=False
    )


def interpreter(version: str) -> Path | None:
    """A Python of this version on the machine; a program of that name may only say that there is none."""
    named = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for program in filter(None, named):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        told = subprocess.run([program, "-c", code], capture_output=True, text=True, check=False)
        if told.stdout.strip() == version:
            return Path(program)
    return None


_DOWNSTREAM = """
from pathlib import Path
from typing import assert_type

import nirvana_deploy as nd
from nirvana_deploy import Evaluation, Progress, PrunePlan, Quantization, Search, ShownProgress, Target
from nirvana_deploy import Workload

shown: Progress = ShownProgress()
done = nd.prune_export("smollm2", sparsity=0.4, quantize=("w4",), gamma="auto", progress=shown)
assert_type(done.out, Path)
assert_type(done.plan, PrunePlan)
assert_type(done.plan.budget.met_removed_share, float)
if done.verdict is not None:
    assert_type(done.verdict.recommended, str | None)
met = nd.meet_target("smollm2", Target(max_kl=0.2), quantize=("w4",))
assert_type(met.chosen.kl, float | None)
found = nd.search_points("smollm2", recipe=Search(sparsities="0,0.2"), seq_len=64)
assert_type(found.page, Path | None)
assert_type(nd.verify_folder(done.out).passed, bool)
assert_type(nd.generate_text(done.out, "Hello", max_new_tokens=4).text, str)
assert_type(nd.report_folder("out"), tuple[Path, Path])
assert_type(nd.build_engines("out"), tuple[Path, ...])
assert_type(nd.package_gguf("out", weight_type="q8_0").size_bytes, int)
assert_type(nd.select_calibration("smollm2", nd.Selection(sparsity=0.4)).verdict, str)
assert_type(nd.recipe_toml(nd.job_of("smollm2", {"sparsity": 0.4})), str)
nd.benchmark_folder("out", Workload(repeats=3))["variants"]
nd.benchmark_workloads("out", nd.Traffic(workloads=("chat",), sweeps=("batch=1,2",)))["sweeps"]
nd.evaluate_folder("out", Evaluation(eval_text=(Path("notes.txt"),)))
nd.recover_folder("out", recover="30m")
nd.quantize_onnx_folder("onnx", "onnx-w4", Quantization(scheme="w4"))
assert_type([model.hub_id for model in nd.known_models().values()], list[str])

nd.prune_export("smollm2")  # type: ignore[call-arg]
nd.prune_export("smollm2", sparsity="much")  # type: ignore[arg-type]
nd.prune_export("smollm2", sparsity=0.4, sparsty=0.5)  # type: ignore[call-arg]
Workload(repeat=3)  # type: ignore[call-arg]
nd.prune_exprot  # type: ignore[attr-defined]
"""


@pytest.mark.slow
def test_what_is_built_on_the_wheel_is_checked_by_type(wheel: Path, tmp_path: Path) -> None:
    """With mypy --strict, where an ignored line that is no error is one."""
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    python = programs_of(tmp_path / "venv") / "python"
    asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    told = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True)
    packages = Path(told.stdout.strip())
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (tmp_path / "user.py").write_text(_DOWNSTREAM)
    strict = ["--strict", "--python-executable", str(python), "--config-file", os.devnull]
    done = elsewhere([sys.executable, "-m", "mypy", *strict, "user.py"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
