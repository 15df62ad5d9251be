"""Folders of the hub's cache are read through their links, and called after the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from nirvana_deploy.model.snapshot import lies_within, name_of


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = tmp_path / "models--owner--tiny-model" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "ffff").write_bytes(b"weights")
    (folder / "model.onnx.data").symlink_to("../../blobs/ffff")
    return folder


def test_links_to_blobs_lie_within_a_snapshot(snapshot: Path, tmp_path: Path) -> None:
    assert lies_within(snapshot / "model.onnx.data", snapshot)
    (tmp_path / "secret").write_text("elsewhere")
    (snapshot / "out").symlink_to(tmp_path / "secret")
    assert not lies_within(snapshot / "out", snapshot)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "data").symlink_to(snapshot.parent.parent / "blobs" / "ffff")
    assert not lies_within(plain / "data", plain)


def test_a_snapshot_is_called_after_its_model(snapshot: Path, tmp_path: Path) -> None:
    assert name_of(snapshot) == "tiny-model"
    assert name_of(tmp_path / "folder") == "folder"
    assert name_of(tmp_path / "snapshots" / "abc") == tmp_path.name.rpartition("--")[2]
