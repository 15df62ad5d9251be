"""Failures that a user sees without a traceback.

An error is an instruction: what is wrong, the value found, the values allowed and, in ``hint``, the next
command to type. Any other exception is our bug: the command line says so, and shows the trace where
TRACE_VARIABLE is set.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

TRACE_VARIABLE = "NIRVANA_DEPLOY_TRACE"
UNFORESEEN = "This is a fault of nirvana-deploy"
"""How the message about one begins."""
_PACKAGE, _DISTRIBUTION = "nirvana_deploy", "nirvana-deploy"
_ROOT = Path(__file__).parents[2]
"""Holds the package: a checkout of the repository, or a site-packages folder."""


class NirvanaError(Exception):
    """The user's problem: one clear message, exit code 1.

    ``hint`` names the next step ("pip install ...", "pass --force"); it is printed on its own line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its class, whatever that is constructed from: processes hand errors to each other."""
        return _again, (type(self), self.message, self.hint), dict(self.__dict__)


def _again(kind: type[NirvanaError], message: str, hint: str | None) -> NirvanaError:
    error = kind.__new__(kind)
    NirvanaError.__init__(error, message, hint=hint)
    return error


class LaterVersionError(NirvanaError):
    """A file that a later version of this package wrote."""


class VerificationError(NirvanaError):
    """A stage's result differs from the stage before it: exit code 3; artifacts are kept."""

    exit_code = 3


class QualityError(NirvanaError):
    """A model misses the quality that was required of it: exit code 3; artifacts are kept."""

    exit_code = 3


class ContenderError(NirvanaError):
    """A contender of a benchmark could not be timed: exit code 3; the results of the others are kept."""

    exit_code = 3


class RegressionError(NirvanaError):
    """Something got slower or worse beyond noise since an earlier benchmark: exit code 4."""

    exit_code = 4


class MissingExtraError(NirvanaError):
    """An optional package is needed but not installed."""

    def __init__(self, what_for: str, *, package: str, extra: str) -> None:
        super().__init__(
            f"{what_for} needs the package {package!r}, which is not installed.",
            hint=install_extra(extra),
        )


def install_extra(extra: str) -> str:
    """The command that installs an extra of this package for the Python that runs it, from this folder."""
    where = _checkout()
    if where is None:
        return f"{pip_install()} {shlex.quote(f'{_DISTRIBUTION}[{extra}]')}"
    return f"{pip_install()} -e {shlex.quote(f'{where}[{extra}]')}"


def upgrade() -> str:
    """The command that brings a newer version of this package."""
    where = _checkout()
    if where is None:
        return f"{pip_install()} --upgrade {_DISTRIBUTION}"
    return "git pull" if where == "." else f"git -C {shlex.quote(where)} pull"


def pip_install() -> str:
    """How the Python that runs this is told to install something."""
    found = shutil.which("pip")
    if found is not None and Path(found).parent.resolve() == Path(sys.executable).parent.resolve():
        return "pip install"
    return f"{shlex.quote(sys.executable)} -m pip install"


def _checkout() -> str | None:
    """The checkout that this package runs from, as seen from the current folder; None if it was installed."""
    try:
        ours = f'name = "{_DISTRIBUTION}"' in (_ROOT / "pyproject.toml").read_text(encoding="utf-8")
        return None if not ours else "." if Path.cwd() == _ROOT else str(_ROOT)
    except OSError:
        return None


class TokenizerError(NirvanaError):
    """The tokenizer in a folder cannot be loaded; says why in one sentence."""

    def __init__(self, folder: Path, error: Exception) -> None:
        missing = not (folder / "tokenizer.json").is_file()
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        reason = "tokenizer.json is missing" if missing else said
        super().__init__(
            f"The tokenizer in {folder} cannot be loaded: {reason}.",
            hint="Copy tokenizer.json and tokenizer_config.json there from the checkpoint, or download them "
            "again.",
        )


def unforeseen(error: Exception) -> NirvanaError:
    """What the user is told of an exception that nobody foresaw: what, where, and what to do."""
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in frame.filename]
    at = ""
    if places:
        at = f", at {places[-1].filename.rpartition(_PACKAGE)[2].lstrip('/')}:{places[-1].lineno}"
    said = str(error).strip().partition("\n")[0][:300]
    return NirvanaError(
        f"{UNFORESEEN}, or a file that it does not understand: {type(error).__name__}: {said}{at}.",
        hint=f"Please report it, with what the same command shows when {TRACE_VARIABLE}=1 is set.",
    )
