"""The command line as a user meets it: light help, clear errors, results on stdout and logs on stderr."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders.documents import commands_in, parse
from builders.tiny import write_tiny
from builders.unix import resource_limits
from click.testing import CliRunner

from nirvana_deploy.base.errors import TRACE_VARIABLE, UNFORESEEN
from nirvana_deploy.cli.main import _COMMANDS, commands, main
from nirvana_deploy.pipeline.prune_export import Deployment

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "matplotlib", "numpy", "rich", "jinja2")


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line of this process: ``run(*arguments)``, in the current folder."""

    def run_main(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["nirvana-deploy", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        code = int(ended.value.code or 0)
        return subprocess.CompletedProcess(arguments, code, stdout=printed.out, stderr=printed.err)

    return run_main


def imported_by(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("statement", ["import nirvana_deploy", "import nirvana_deploy.cli.main"])
def test_importing_is_light(statement: str) -> None:
    assert imported_by(statement).isdisjoint(HEAVY)


def test_every_help_page_is_light() -> None:
    calls = [[], *([name] for name in _COMMANDS)]
    statement = (
        "from nirvana_deploy.cli.main import commands\n"
        "import contextlib, io\n"
        f"for arguments in {calls!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        commands.main([*arguments, '--help'], standalone_mode=False)"
    )
    assert imported_by(statement).isdisjoint(HEAVY)


@pytest.mark.gate
@pytest.mark.parametrize("command", list(_COMMANDS))
def test_every_command_has_help_with_an_example_and_json(command: str) -> None:
    page = CliRunner().invoke(commands, [command, "--help"], prog_name="nirvana-deploy")
    assert page.exit_code == 0 and f"nirvana-deploy {command}" in page.output and "Example" in page.output
    assert "--json" in page.output


@pytest.mark.gate
def test_help_is_instant() -> None:
    resource = resource_limits()

    def cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "nirvana_deploy", "--help"]
        page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "prune-export" in page
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return float(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert min(cpu_s() for _ in range(3)) < 0.3


def test_the_package_resolves_its_public_names_on_use() -> None:
    import nirvana_deploy

    assert set(nirvana_deploy.__all__) == set(nirvana_deploy._PUBLIC)
    for name in nirvana_deploy.__all__:
        assert getattr(nirvana_deploy, name).__doc__
    assert set(dir(nirvana_deploy)) == {*nirvana_deploy.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'prune_exprot'"):
        _ = nirvana_deploy.prune_exprot


def test_a_wrong_command_is_a_usage_error_with_a_guess(run: Run) -> None:
    result = run("prune-exprot", "smollm2")
    assert result.returncode == 2 and "Did you mean 'prune-export'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["prune-export", "smolm2", "--sparsity", "0.4"], 1, "Did you mean 'smollm2"),
        (["prune-export", "smollm2"], 2, "--sparsity"),
        (["inspect", "nowhere"], 1, "nowhere"),
        (["verify", "."], 1, "is not an output folder of this tool"),
        (["export", "no/such/folder", "--out", "x"], 1, "does not exist"),
    ],
)
def test_the_users_problems_end_with_one_message(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.returncode == code and complaint in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_prune_inspect_and_export_on_a_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny-model", "llama-tied")
    options = ["--preset", "paper", "--sparsity", "0.3", "--gamma", "1", "--round-to", "4"]
    sizes = ["--num-sequences", "4", "--seq-len", "16"]
    pruned = run("prune", "./tiny-model", *options, *sizes, "--json")
    assert pruned.returncode == 0, pruned.stderr
    result = json.loads(pruned.stdout)
    assert result["out"] == "tiny-model-s0.3" and 0.2 < result["met_removed_share"] <= 0.3
    assert "Scoring 4 x 16 tokens" in pruned.stderr

    shown = run("inspect", "tiny-model-s0.3")
    assert shown.returncode == 0 and "of the linear weights removed" in shown.stdout

    exported = run("export", "tiny-model-s0.3/checkpoint", "--out", "onnx")
    assert exported.returncode == 0 and "nodes" in exported.stdout, exported.stderr
    again = run("export", "tiny-model-s0.3/checkpoint", "--out", "onnx")
    assert again.returncode == 1 and "--force" in again.stderr


def test_a_job_ends_with_the_command_that_runs_what_it_recommends(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a folder"
    cost = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1}

    def told(recommended: str | None) -> str:
        judged = {"level": "ship", "recommended": recommended, "title": "Ship", "why": "It is faster."}
        manifest = {"stages": {"report": {"result": judged, **cost}}}
        done = Deployment(out, None, manifest, None, out / "report.html")  # type: ignore[arg-type]
        monkeypatch.setattr("nirvana_deploy.pipeline.prune_export.run_job", lambda *_, **__: done)
        return run("prune-export", "tiny", "--sparsity", "0.2").stdout.splitlines()[-1]

    found = told("dense-w4")
    [words] = commands_in(found.removeprefix("Try it: "))
    parse(words)
    assert words[:2] == ["generate", str(out / "dense" / "onnx-w4")]
    assert told(None) == f"Report: {out / 'report.html'}"


def test_select_calib_ranks_candidates(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "model", "llama-tied")
    (tmp_path / "text.txt").write_text("".join(f"Line {i} says {i * i}.\n" for i in range(300)))
    options = ["--sparsity", "0.3", "--candidates", "2", "--corpora", "text.txt", "--gamma", "1,M/A"]
    sizes = ["--num-sequences", "2", "--seq-len", "16", "--heldout-sequences", "4", "--heldout-len", "8"]
    command = ["select-calib", "model", *options, *sizes]
    result = run(*command, "--json")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["schema"] == 1 and len(data["candidates"]) == 4
    kls = [candidate["kl"] for candidate in data["candidates"]]
    assert data["winner"] == kls.index(min(kls))
    table = run(*command, "--round-to", "4")
    assert table.returncode == 0 and "Winner: file text.txt" in table.stdout
    crowded = run(*command[:4], "--candidates", "999", *command[6:])
    assert crowded.returncode == 1 and "room for" in crowded.stderr


def test_a_place_that_may_not_be_used_is_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_with(error: OSError) -> None:
        def fail(**_: object) -> None:
            raise error

        monkeypatch.setattr(commands, "main", fail)

    fails_with(PermissionError(errno.EACCES, "Permission denied", "secret/config.json"))
    result = run("inspect", "secret")
    assert result.returncode == 1
    assert result.stderr == "Error: secret/config.json cannot be used: Permission denied.\n"
    fails_with(FileNotFoundError(errno.ENOENT, "No such file", "ours"))  # which we should have looked for
    result = run("inspect", "secret")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and result.stderr.startswith(f"Error: {UNFORESEEN}")
    assert "FileNotFoundError" in result.stderr and f"{TRACE_VARIABLE}=1" in result.stderr
    monkeypatch.setenv(TRACE_VARIABLE, "1")
    with pytest.raises(FileNotFoundError):
        main()
