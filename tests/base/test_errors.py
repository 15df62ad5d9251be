"""Commands in hints can be typed where the user stands."""

from __future__ import annotations

import pickle
import shlex
import sys
from pathlib import Path

import pytest

from nirvana_deploy.base import errors
from nirvana_deploy.base.errors import (
    MissingExtraError,
    NirvanaError,
    VerificationError,
    install_extra,
    pip_install,
    upgrade,
)
from nirvana_deploy.recover.learning.student import NotFiniteError
from nirvana_deploy.runtime.tensorrt.cuda import CudaError


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip of this Python comes first on the PATH."""
    monkeypatch.setattr(errors.shutil, "which", lambda name: str(Path(sys.executable).with_name(name)))


def test_in_a_checkout_the_extra_is_that_of_the_folder(
    pip: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    assert (install_extra("eval"), upgrade()) == ("pip install -e '.[eval]'", "git pull")
    monkeypatch.chdir(tmp_path)
    assert shlex.split(install_extra("eval"))[-1] == f"{root}[eval]"
    assert shlex.split(upgrade()) == ["git", "-C", str(root), "pull"]


@pytest.mark.parametrize("stranger", [None, '[project]\nname = "another"\n'])
def test_an_installed_package_is_named(
    pip: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stranger: str | None
) -> None:
    if stranger is not None:
        (tmp_path / "pyproject.toml").write_text(stranger, encoding="utf-8")
    monkeypatch.setattr(errors, "_ROOT", tmp_path)
    assert install_extra("eval") == "pip install 'nirvana-deploy[eval]'"
    assert upgrade() == "pip install --upgrade nirvana-deploy"


@pytest.mark.parametrize("found", [None, "/somewhere/else/pip"])
def test_a_pip_of_another_python_is_not_what_is_typed(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    monkeypatch.setattr(errors.shutil, "which", lambda name: found)
    assert shlex.split(pip_install()) == [sys.executable, "-m", "pip", "install"]


@pytest.mark.parametrize(
    "error",
    [
        VerificationError("It differs.", hint="Look at it."),
        MissingExtraError("--cluster", package="ray", extra="cluster"),
        NotFiniteError(float("nan"), step=3, learning_rate=1e-3, peak_rate=1e-2),
        CudaError("It failed.", name="cudaErrorUnknown"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_process_hands_an_error_to_another_as_it_is(error: NirvanaError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and vars(again) == vars(error)
    assert (str(again), again.exit_code) == (str(error), error.exit_code)
