"""The course told elsewhere: tensorboard's files hold what the record holds, wandb is asked for by name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from builders.extras import needs
from builders.recovering import Cut

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.recover import training
from nirvana_deploy.recover.learning import logs


@pytest.fixture
def llama(tmp_path: Path, text: Path) -> Cut:
    return Cut(tmp_path, "llama-tied", text)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return [(one.step, one.value) for one in found.Scalars(tag)]


def test_tensorboard_has_the_course_also_of_a_training_that_was_killed(
    llama: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("tensorboard")
    told, count = training._Told.on_step_end, 0

    def kill(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        told(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training._Told, "on_step_end", kill)
        with pytest.raises(KeyboardInterrupt):
            llama.recover(recover_log="tensorboard")
    assert list((llama.folder / "state/log").glob("events.*"))
    done = llama.recover(recover_log="tensorboard")
    log = llama.folder / "recovery/log"
    course = dict(scalars(log, "eval/kl"))
    assert course == {point.step: pytest.approx(point.kl, rel=1e-6) for point in done.course.curve}
    assert [step for step, _ in scalars(log, "train/loss")] == [3, 6, 9, 12]
    assert not (llama.folder / "state").exists()


class FakeWandb(ModuleType):
    """As much of wandb as the Trainer's callback uses."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.run: Any = None
        self.begun: dict[str, Any] = {}
        self.told: list[dict[str, Any]] = []
        self.config: Any = SimpleNamespace(update=lambda *args, **kwargs: None)
        self.Error = type("Error", (Exception,), {})

    def init(self, **options: Any) -> Any:
        self.begun = options
        self.run = SimpleNamespace(
            summary={}, finish=lambda: setattr(self, "run", None), _label=lambda **_: None
        )
        return self.run

    def log(self, values: dict[str, Any]) -> None:
        self.told.append(values)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    from transformers.integrations import integration_utils

    found = FakeWandb()
    config_util = ModuleType("wandb.sdk.lib.config_util")
    config_util.ConfigError = type("ConfigError", (Exception,), {})  # type: ignore[attr-defined]
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "wandb", found)
    monkeypatch.setitem(sys.modules, config_util.__name__, config_util)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    return found


def test_wandb_is_begun_in_the_folder_and_ended(llama: Cut, fake: FakeWandb) -> None:
    done = llama.recover(recover_log="wandb")
    assert Path(fake.begun["dir"]) == llama.folder / "state/log" and fake.run is None
    course = {one["train/global_step"]: one["eval/kl"] for one in fake.told if "eval/kl" in one}
    assert course == {point.step: point.kl for point in done.course.curve}


def test_a_wandb_that_begins_nothing_is_a_sentence(llama: Cut, fake: FakeWandb) -> None:
    def refuse(**options: Any) -> None:
        raise fake.Error("api_key not configured (no-tty).")

    fake.init = refuse  # type: ignore[method-assign, assignment]
    with pytest.raises(NirvanaError, match=r"could not begin a run: api_key.*\n.*WANDB_MODE=offline"):
        llama.recover(recover_log="wandb")


def test_a_missing_package_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(MissingExtraError, match=r"wandb needs.*\n.*pip install .*\[wandb\]'"):
        logs.require_log("wandb", method="distill")
    with pytest.raises(MissingExtraError, match=r"tensorboard needs.*\n.*pip install .*\[recover\]"):
        logs.require_log("tensorboard", method="distill")
    logs.require_log("none", method="layers")


def test_block_by_block_has_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: name)  # type: ignore[attr-defined]
    with pytest.raises(NirvanaError, match=r"--recover-method layers trains without it.\n.*distill"):
        logs.require_log("tensorboard", method="layers")
