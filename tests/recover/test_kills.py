"""Kill -9 at ten moments of a training, and again: the course is that of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.recovering import Cut
from safetensors.torch import load_file

from nirvana_deploy.recover import training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that has imported all is a fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
MOMENTS = 10


def in_a_fork(work: Callable[[], None]) -> int:
    """How a process of its own ends that does ``work``: its code, or minus the signal that ended it."""
    process = os.fork()
    if not process:
        try:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException:  # all of it must end here
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def recovered(cut: Cut, out: str, *, killed_at: int | None = None) -> int:
    """Train to ``out`` with its course beside it, until the event of that number; how the process ended.

    An event is the end of a step, or something that Python does to a file of the saved states.
    """
    state, told = str(cut.folder / "state"), training._Told.on_step_end
    events = 0

    def happened() -> None:
        nonlocal events
        events += 1
        if events == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(("open", "os.", "shutil.")) and arguments and str(arguments[0]).startswith(state):
            happened()

    def stepped(self: Any, *arguments: Any, **kwargs: Any) -> None:
        told(self, *arguments, **kwargs)
        happened()

    def work() -> None:
        training._Told.on_step_end = stepped  # type: ignore[method-assign, unused-ignore]
        sys.addaudithook(audit)
        done = cut.recover(out)
        found = {"events": events, "course": asdict(done.course)}
        (cut.folder / f"{out}.json").write_text(json.dumps(found))

    return in_a_fork(work)


def test_killed_at_ten_moments_and_resumed_it_gives_the_same_curve(tmp_path: Path, text: Path) -> None:
    cut = Cut(tmp_path, "llama-tied", text)
    assert recovered(cut, "undisturbed") == 0
    undisturbed = json.loads((tmp_path / "undisturbed.json").read_text())
    count, curve = undisturbed["events"], undisturbed["course"]["curve"]
    assert count > 3 * MOMENTS
    weights = load_file(tmp_path / "undisturbed/model.safetensors")
    for moment in range(1, MOMENTS + 1):
        assert recovered(cut, "resumed", killed_at=moment * count // (MOMENTS + 1)) == -signal.SIGKILL
        assert not (tmp_path / "resumed").exists()
        assert recovered(cut, "resumed") == 0
        again = json.loads((tmp_path / "resumed.json").read_text())["course"]
        assert again["kept_step"] == undisturbed["course"]["kept_step"]
        for one, other in zip(curve, again["curve"], strict=True):
            assert (one["step"], one["kl"]) == (other["step"], pytest.approx(other["kl"], rel=1e-6))
        for name, tensor in load_file(tmp_path / "resumed/model.safetensors").items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=1e-7)
        for file in (tmp_path / "resumed").iterdir():
            file.unlink()
        (tmp_path / "resumed").rmdir()
