"""How much a command says: ``--quiet``, ``--verbose`` and ``--log-file``, before or after its name."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from nirvana_deploy import __version__
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.terminal import harmless

Command = TypeVar("Command", bound=Callable[..., Any])
_STAMP = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
"""What a line of a log begins with."""


@dataclass
class Talk:
    """What is said where; the object of click's context."""

    quiet: bool = False
    verbose: bool = False
    log_file: Path | None = None

    def log(self, text: str) -> None:
        """Add ``text`` to the log file, if any, with the time; a log that cannot be written ends no job."""
        if self.log_file is None:
            return
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        lines = "".join(f"{stamp} {line}\n" for line in harmless(text).splitlines() if line.strip())
        with suppress(OSError), self.log_file.open("a", encoding="utf-8", errors="replace") as file:
            file.write(lines)


def talk() -> Talk:
    """What the user asked for; all defaults outside of a command."""
    context = click.get_current_context(silent=True)
    return (None if context is None else context.find_object(Talk)) or Talk()


def command_line() -> str:
    """Return the command line, for the manifest."""
    return shlex.join(["nirvana-deploy", *sys.argv[1:]])


def talking(command: Command) -> Command:
    """Give the group its options for what is said."""
    for option in reversed(_options(hidden=False)):
        command = option(command)
    return command


def also_talking(command: click.Command) -> None:
    """Let ``command`` take the group's options as well; its help page points to them."""
    if any(parameter.name == "log_file" for parameter in command.params):
        return
    for option in _options(hidden=True):
        option(command)
    command.epilog = "-q, -v and --log-file FILE go with every command: nirvana-deploy --help."


def _options(*, hidden: bool) -> list[Callable[[Any], Any]]:
    shared: dict[str, Any] = {"expose_value": False, "hidden": hidden}
    return [
        click.option(
            "-q",
            "--quiet",
            is_flag=True,
            callback=_set,
            help="Print errors and the result alone: no progress, no tables beside it.",
            **shared,
        ),
        click.option(
            "-v",
            "--verbose",
            is_flag=True,
            callback=_set,
            help="Print when a step begins, what each stage took and wrote, and the trace of a fault.",
            **shared,
        ),
        click.option(
            "--log-file",
            metavar="FILE",
            type=click.Path(path_type=Path),
            callback=_log_to,
            help="Append all of that to FILE with times, also with --quiet.",
            **shared,
        ),
    ]


def _set(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or parameter.name is None:
        return
    asked = context.ensure_object(Talk)
    setattr(asked, parameter.name, True)
    if asked.quiet and asked.verbose:
        raise click.UsageError("--quiet and --verbose say two things; leave one of them out.")


def _log_to(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is None:
        return
    _require_log(value)
    asked = context.ensure_object(Talk)
    asked.log_file = value
    asked.log(f"{command_line()} (version {__version__}, in {Path.cwd()})")


def _require_log(path: Path) -> None:
    """Raise NirvanaError for a file that cannot be appended to, or holds something else than a log."""
    try:
        with path.open("a+b") as file:
            file.seek(0)
            begins = file.read(32)
    except OSError as error:
        raise NirvanaError(
            f"--log-file {path} cannot be written: {error.strerror}.",
            hint="Name a file in a folder that exists.",
        ) from error
    if begins and not _STAMP.match(begins):
        raise NirvanaError(
            f"--log-file {path} is no log: its first line does not begin with a time.",
            hint="Name another file; a log of this tool is continued.",
        )
