"""What a command says, and where: quietly, in detail, into a log; for people and for pipes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from builders.tiny import write_tiny
from click.testing import CliRunner

from nirvana_deploy.base.errors import TRACE_VARIABLE
from nirvana_deploy.cli import talk as talking
from nirvana_deploy.cli.common import TerminalProgress, echo, echo_table, warn
from nirvana_deploy.cli.main import _goes_on, commands, main

Run = Callable[..., "subprocess.CompletedProcess[str]"]
STAMPED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S* (.*)")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command line of this process, in an empty folder with a tiny model."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny", "llama-tied")

    def run_main(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["nirvana-deploy", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), printed.out, printed.err)

    return run_main


PRUNE = (
    "prune",
    "./tiny",
    "--preset",
    "paper",
    "--sparsity",
    "0.3",
    "--round-to",
    "4",
    "--num-sequences",
    "2",
)
SHORT = (*PRUNE, "--seq-len", "16", "--force")


def lines_of(log: Path) -> list[str]:
    found = [STAMPED.fullmatch(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line[1] for line in found if line is not None]


@pytest.mark.parametrize("before", [True, False])
def test_quiet_leaves_the_result(run: Run, before: bool) -> None:
    result = run(*(("-q", *SHORT) if before else (*SHORT, "--quiet")))
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.splitlines()[-1].startswith("Checkpoint: ")
    refused = run("-q", "inspect", "nowhere")
    assert refused.returncode == 1 and "nowhere does not exist" in refused.stderr


def test_verbose_adds_what_stages_took_and_wrote(run: Run) -> None:
    assert " took " not in run(*SHORT).stderr
    said = run(*SHORT, "-v").stderr
    assert re.search(r"^4 of 4: Slicing weights begins$", said, re.MULTILINE)
    assert re.search(
        r"^4 of 4: checkpoint took .* of CPU, at most .*B; wrote checkpoint$", said, re.MULTILINE
    )


def test_a_log_has_all_of_it_with_times_and_is_continued(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert run("--log-file", str(log), "-q", *SHORT).stderr == ""
    lines = lines_of(log)
    assert len(lines) == len(log.read_text(encoding="utf-8").splitlines())
    assert lines[0].startswith("nirvana-deploy --log-file ") and lines[-1] == "Exit code 0"
    assert "4 of 4: Slicing weights begins" in lines and any(
        line.startswith("Checkpoint: ") for line in lines
    )
    assert run("inspect", "nowhere", "--log-file", str(log)).returncode == 1
    again = lines_of(log)
    assert again[: len(lines)] == lines
    assert any("nowhere does not exist" in line for line in again) and again[-1] == "Exit code 1"


@pytest.mark.parametrize("name", ["tiny", "no/where.txt", "tiny/config.json"])
def test_a_log_goes_where_a_log_can_be(run: Run, name: str) -> None:
    before = Path("tiny/config.json").read_bytes()
    result = run(*SHORT, "--log-file", name)
    assert result.returncode == 1 and f"--log-file {name}" in result.stderr
    assert Path("tiny/config.json").read_bytes() == before and not Path("tiny-s0.3").exists()


def test_quiet_and_verbose_are_two_things(run: Run) -> None:
    for arguments in (("-q", "models", "-v"), ("models", "-q", "-v")):
        assert run(*arguments).returncode == 2


def test_a_fault_shows_its_trace_on_request_and_leaves_it_in_the_log(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.delenv(TRACE_VARIABLE, raising=False)
    monkeypatch.setattr("nirvana_deploy.output.inspection.inspect_path", fail)
    told = run("inspect", "tiny", "--log-file", "log.txt")
    assert told.returncode == 1 and "Traceback" not in told.stderr
    assert "Traceback (most recent call last):" in lines_of(tmp_path / "log.txt")
    monkeypatch.setattr(sys, "argv", ["nirvana-deploy", "-v", "inspect", "tiny"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_every_command_takes_them_and_one_page_explains_them() -> None:
    context = click.Context(commands)
    assert "--log-file" in commands.get_help(context)
    for name in commands.list_commands(context):
        command = commands.get_command(context, name)
        assert command is not None
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"-q", "--quiet", "-v", "--verbose", "--log-file"} <= options
        page = command.get_help(click.Context(command, info_name=name))
        assert page.count("--log-file") == 1 and "nirvana-deploy --help" in page


def test_lines_say_which_stage_and_which_model(capfd: pytest.CaptureFixture[str]) -> None:
    progress = TerminalProgress()
    with progress.within("s0.2"), progress.within("3 of 11", otherwise="verify"):
        with progress.within("pruned", otherwise="verify"):
            progress.note("Layers see the last 8 tokens")
        with progress.within("dense", otherwise="verify"):
            progress.detail("nobody asked")
    progress.note("Done")
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "s0.2, 3 of 11, pruned: Layers see the last 8 tokens"
    assert re.fullmatch(r"s0\.2, 3 of 11, dense: verify: .* s", said[1]) and said[2:] == ["Done"]


def test_a_piped_table_is_tab_separated(capsys: pytest.CaptureFixture[str]) -> None:
    echo_table(["Name", "Size", ""], [["a\tb", "1 kB", "##"], ["c\nd", "2 kB", "#"]], title="Sizes")
    assert capsys.readouterr().out == "# Sizes\nName\tSize\na b\t1 kB\nc; d\t2 kB\n"
    echo_table(["", "dense"], [["Decode", "1 ms"]])  # what stands in the rows is told, header or not
    assert capsys.readouterr().out == "\tdense\nDecode\t1 ms\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_of_many_models_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    screen = _Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    names = [f"pruned-{number}" for number in range(8)]
    rows = [[f"Measure {row}", *(f"{row}.{n} ms (1.04 times faster)" for n in range(8))] for row in range(3)]
    echo_table(["Measure", *names], rows, title="All")
    shown = screen.getvalue()
    assert max(map(len, shown.splitlines())) <= 80 and shown.count("All") == 1
    assert all(shown.count(name) == 1 for name in names)
    assert all(cell in shown for row in rows for cell in row)


def test_a_log_that_is_taken_away_ends_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = talking.Talk(log_file=tmp_path / "gone" / "log.txt")
    with click.Context(commands, obj=said):
        echo("still here")
    assert capsys.readouterr().out == "still here\n"


def test_a_command_goes_on_if_it_has_an_option_for_it() -> None:
    assert all(_goes_on(["-q", name, "m"]) for name in ("prune", "prune-export", "search"))
    assert not any(_goes_on(words) for words in (["serve", "search"], ["recover", "o"], ["--help"], []))


def test_a_caution_is_red_on_a_terminal_alone() -> None:
    @click.command()
    def cautious() -> None:
        warn(["The machine was \x1b[2Jbusy."])

    said = "Caution: The machine was \\x1b[2Jbusy."
    assert CliRunner().invoke(cautious).output == f"{said}\n"
    assert CliRunner().invoke(cautious, color=True).output == f"\x1b[31m{said}\x1b[0m\n"
