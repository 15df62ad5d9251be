"""What several commands share: options, progress on stderr, tables on stdout."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from nirvana_deploy.base.progress import Advance
from nirvana_deploy.runtime.table import RUNTIMES

Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=None,
    help="Threads of ONNX Runtime. [all physical cores]",
)

runtime_option = click.option(
    "--runtime",
    type=click.Choice(tuple(RUNTIMES)),
    default=None,
    help="What runs the model. [an engine's own, else onnxruntime-cpu]",
)


class _Gamma(click.ParamType[Any]):
    """A positive number, or the word auto."""

    name = "float|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse what the user typed."""
        if value == "auto":
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'auto'.", param, ctx)


def pruning_options(command: Command) -> Command:
    """The options that decide what is removed, as ``prune`` and ``prune-export`` take them."""
    options = [
        click.option(
            "--sparsity",
            type=float,
            default=None,
            help="Share of the decoder's linear weights to remove, for example 0.4.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            default=None,
            help="Output folder. [./<model>-s<sparsity>]",
        ),
        click.option(
            "--saliency",
            default="nirvana",
            show_default=True,
            help="nirvana, nirvana-vocab, taylor, wanda-sp, flap, magnitude, random; several with commas, "
            "or 'auto', are chosen among by KL.",
        ),
        click.option(
            "--gamma",
            type=_Gamma(),
            default=None,
            help="MLP sparsity / attention sparsity, or 'auto' to choose by KL. "
            "[M/A, the ratio of MLP to attention weights]",
        ),
        click.option(
            "--allocation",
            type=click.Choice(["global", "uniform"]),
            default="global",
            show_default=True,
            help="Layers differ, or all get one shape (loads in stock transformers and other consumers).",
        ),
        click.option(
            "--round-to",
            type=click.IntRange(min=1),
            default=8,
            show_default=True,
            help="Kept FFN widths are multiples of this.",
        ),
        click.option(
            "--calib",
            default="pydoc",
            show_default=True,
            help="Calibration text: a .txt or .jsonl file, pydoc, self, c4, bookcorpus, wikitext, lambada; "
            "several with commas, or 'auto' (pydoc and self), are chosen among by KL.",
        ),
        click.option(
            "--candidates",
            type=click.IntRange(min=1),
            default=None,
            help="Calibration sets drawn from each source to choose among. [4 for auto, else 1]",
        ),
        click.option(
            "--num-sequences",
            type=click.IntRange(min=1),
            default=32,
            show_default=True,
            help="Windows drawn.",
        ),
        click.option(
            "--seq-len", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens a window."
        ),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draw."),
        click.option(
            "--micro-batch",
            type=click.IntRange(min=1),
            default=8,
            show_default=True,
            help="Windows scored at a time; changes memory, not the result.",
        ),
        click.option(
            "--reconstruct/--no-reconstruct",
            default=False,
            show_default=True,
            help="Refit what the cut leaves of the output projections (o, down) by least squares on the "
            "calibration windows; shapes and speed stay. Needs as many tokens as the widest FFN has neurons.",
        ),
        click.option(
            "--eval-text",
            type=click.Path(path_type=Path),
            default=None,
            help="Measure quality on this text. [held-out windows of the calibration text]",
        ),
        click.option("--resume", is_flag=True, help="Continue after the last finished stage in --out."),
        click.option("--force", is_flag=True, help="Replace what an earlier run left in --out."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def require_sparsity(options: dict[str, Any]) -> None:
    """Usage error unless --sparsity was given."""
    if options["sparsity"] is None:
        raise click.UsageError("Missing option '--sparsity', for example --sparsity 0.4.")


class TerminalProgress:
    """Bars with an ETA on stderr where it is a terminal, one line a task where it is not."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Show one task while it runs, and its seconds when it is done."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        started = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        if self._console.is_terminal:
            with Progress(*columns, console=self._console, transient=True) as bars:
                bar = bars.add_task(label, total=total)
                yield lambda steps: bars.advance(bar, steps)
        else:
            yield lambda steps: None
        self.note(f"{label}: {time.perf_counter() - started:.1f} s")

    def note(self, text: str) -> None:
        """One line of log."""
        self._console.print(text, style="dim", markup=False, soft_wrap=True)


def command_line() -> str:
    """What the user typed, for the manifest."""
    return shlex.join(["nirvana-deploy", *sys.argv[1:]])


def echo_json(value: Any) -> None:
    """Print a result for machines."""
    click.echo(json.dumps({"schema": 1, **value}, indent=1))


def echo_table(headers: Any, rows: Any, *, title: str | None = None) -> None:
    """Print a table for people; the first column is text, the others numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(str(header), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
