"""The command ``nirvana-deploy``: one module a command, each imported when its name is typed."""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
import traceback
from contextlib import suppress
from types import FrameType

import click

from nirvana_deploy import __version__
from nirvana_deploy.base.errors import TRACE_VARIABLE, NirvanaError, unforeseen
from nirvana_deploy.base.machine import keep_to_quota
from nirvana_deploy.base.resources import exhaustion_errors
from nirvana_deploy.base.terminal import brief

from .common import echo
from .talk import Talk, also_talking, talking

# name -> (module, attribute, help line); spelled out so that --help imports none of them
_COMMANDS = {
    "prune-export": ("prune_export", "The whole job: prune, export, verify, measure, report."),
    "recipe": ("recipe", "Show everything that a job would do, as recipe.toml, without running it."),
    "search": ("search", "Try sparsities and precisions, and say which to deploy under a budget."),
    "prune": ("prune", "Score a model and cut it: plan.json and a smaller checkpoint."),
    "recover": ("recover", "Train the pruned model of an output folder toward the dense one, and go on."),
    "select-calib": ("select_calib", "Choose calibration text, gamma and saliency by KL divergence."),
    "export": ("export", "Export a checkpoint, dense or pruned, to an ONNX folder."),
    "quantize": ("quantize", "Quantize an ONNX folder: integer kernels, proved by count."),
    "build-engine": ("build_engine", "Build a TensorRT engine from an output folder or an ONNX folder."),
    "verify": ("verify", "Check an output folder: hashes, logits and greedy tokens against its checkpoint."),
    "benchmark": ("benchmark", "Measure latency and memory: an output folder again, or models of any kind."),
    "evaluate": ("evaluate", "Measure perplexity and KL of an output folder again, on any text."),
    "generate": ("generate", "Stream text from an output folder, an ONNX folder or an engine."),
    "serve": ("serve", "Serve a model over HTTP, as OpenAI's clients ask for it."),
    "package": ("package", "Package an output folder for other programs, or a model with its draft."),
    "report": ("report", "Write the report again from its records, or set finished folders side by side."),
    "inspect": ("inspect", "Show what was kept, and where."),
    "models": ("models", "List the model aliases."),
    "doctor": ("doctor", "Show which runtimes, devices and extras are usable here."),
}


class _LazyGroup(click.Group):
    """Knows its commands by name, and imports the module of the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the work."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"nirvana_deploy.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        also_talking(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Add "did you mean" to click's usage error."""
        from nirvana_deploy.base.registry import nearest_names

        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            close = nearest_names(args[0], list(_COMMANDS))
            guess = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{guess}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nirvana-deploy", help="Show the version and exit.")
@talking
def commands() -> None:
    """From a Hugging Face model to a smaller, verified, measured deployment, in one command.

    \b
    Example:
      nirvana-deploy prune-export smollm2 --sparsity 0.4
    """


_OF_A_PLACE = {
    errno.EACCES, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.EPERM, errno.EROFS, errno.ESTALE,
}  # fmt: skip
"""What the system says of a file or folder that the user may change, and nobody else."""


def main() -> None:
    """Run the command line; the user's problems end with one message and no trace."""
    _take_any_character()
    keep_to_quota()
    talk = Talk()
    try:
        signal.signal(signal.SIGTERM, _interrupted)
        with exhaustion_errors("The command"):
            code = _run(talk)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        _complain(brief(shown.getvalue()), talk)
        code = error.exit_code
    except NirvanaError as error:
        _ignore_interrupts()  # a launcher ends all processes when one fails
        _complain(brief(f"Error: {error}"), talk)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        how = " Finished stages are kept: repeat the command with --resume." if _goes_on(sys.argv[1:]) else ""
        _complain(f"\nInterrupted.{how}", talk)
        sys.stdout.flush()
        # Everything is unwound. An ordinary exit may be turned into death by SIGINT by the interpreter, which
        # remembers an interrupt that arrived while a module was being imported.
        os._exit(130)
    except Exception as error:
        talk.log(traceback.format_exc())
        if os.environ.get(TRACE_VARIABLE) or talk.verbose:
            raise
        _complain(brief(f"Error: {_of_a_place(error) or unforeseen(error)}"), talk)
        code = 1
    _ignore_interrupts()
    talk.log(f"Exit code {code if isinstance(code, int) else 0}")
    sys.exit(code if isinstance(code, int) else 0)


def _ignore_interrupts() -> None:
    """There is nothing left to interrupt."""
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(KeyboardInterrupt):  # one that arrives now
            signal.signal(number, signal.SIG_IGN)


def _take_any_character() -> None:
    """What a stream cannot encode is a question mark, no failure: a pipe of Windows takes 256 characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _complain(message: str, talk: Talk) -> None:
    talk.log(message)
    echo(message, err=True)


def _run(talk: Talk) -> object:
    """Run the command, as one of several processes if a launcher says so."""
    if "MASTER_ADDR" in os.environ:
        from nirvana_deploy.pipeline.launched import run_launched  # torch takes a second to import

        return run_launched(lambda: commands.main(standalone_mode=False, obj=talk))
    return commands.main(standalone_mode=False, obj=talk)


def _of_a_place(error: Exception) -> str | None:
    """What the system says of a place that a command may not use; None for other errors."""
    if isinstance(error, OSError) and error.errno in _OF_A_PLACE and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}."
    return None


def _goes_on(words: list[str]) -> bool:
    """Whether the command of a command line has --resume."""
    name = next((word for word in words if word in _COMMANDS), None)
    command = None if name is None else commands.get_command(click.Context(commands), name)
    return command is not None and any(parameter.name == "resume" for parameter in command.params)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a command as Ctrl-C does; a second one does not cut its cleaning up short."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
