"""Where may be written at all: by every name of a place."""

from __future__ import annotations

from pathlib import Path

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.marker import files_below, require_apart, require_free


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("home/deep", "work/deep", "model/deep", "free"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "text.txt").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("home", "it is your home folder"),
        ("work", "it is the working folder"),
        (".", "it contains your home folder"),
        ("model", "it is what the command reads"),
        ("model/new", "it lies inside .*model, which the command reads"),
        ("model/deep/er/new", "it lies inside"),
        ("free/../model", "it is"),
        ("text.txt", r"it is what the command reads"),
    ],
)
def test_a_place_that_is_needed_is_refused(base: Path, target: str, told: str) -> None:
    with pytest.raises(NirvanaError, match=f"cannot be written: {told}"):
        require_apart(base / target, reads=[base / "model", base / "text.txt"])


@pytest.mark.parametrize("target", ["home/deep", "home/new", "work/deep", "free", "free/new", "model2"])
def test_beside_and_inside_the_home_folder_is_free(base: Path, target: str) -> None:
    require_apart(base / target, reads=[base / "model"])


def test_links_are_followed_on_both_sides(base: Path) -> None:
    (base / "link").symlink_to(base / "model")
    for target, read in (("link", "model"), ("model", "link"), ("link/x", "model"), ("model/x", "link")):
        with pytest.raises(NirvanaError, match="the command reads"):
            require_apart(base / target, reads=[base / read])
    (base / "circle").symlink_to(base / "circle")
    with pytest.raises(NirvanaError, match="cannot be followed"):
        require_apart(base / "circle")


def test_a_mount_point_is_written_into_and_not_replaced() -> None:
    mounted = Path("/proc")
    with pytest.raises(NirvanaError, match="mount point"):
        require_apart(mounted)
    require_apart(mounted, replaced=False)


def test_a_folder_that_cannot_be_listed_counts(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(top: Path, onerror: object) -> object:
        assert callable(onerror)
        onerror(PermissionError(13, "denied", str(top / "closed")))
        return iter(())

    monkeypatch.setattr("nirvana_deploy.base.ownership.marker.os.walk", walk)
    assert list(files_below(base)) == ["closed/"]
    with pytest.raises(NirvanaError, match="did not write closed/"):
        require_free(base / "free", force=True)


def test_an_empty_folder_takes_force(base: Path) -> None:
    with pytest.raises(NirvanaError, match="exists already"):
        require_free(base / "free", force=False)
    require_free(base / "free", force=True)
    require_free(base / "new", force=False)
