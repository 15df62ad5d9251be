"""Options, markers and fixtures of all tests."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# tiny models gain nothing from threads, and threads that wait for work take it from everybody else
os.environ.setdefault("OMP_NUM_THREADS", "1")

import nirvana_deploy  # noqa: F401  first: it switches the telemetry of what is imported below off

# isort: split
import numpy as np
import pytest
from builders.gpu import why_no_gpu
from builders.tiny import KINDS, VOCABULARY, write_tiny
from numpy.typing import NDArray

OTHER_TIERS = frozenset({"consumer", "gate", "gpu", "integration", "slow"})
"""Markers of the tests that are not of the tier ``unit``; see CONTRIBUTING.md."""


LONGEST = (
    "tests/pipeline/test_real_model.py",
    "tests/benchmarks/test_campaign.py",
    "tests/engine/test_real.py",
    "tests/measure/test_evaluate.py",
    "tests/benchmarks/test_scale.py",
    "tests/pipeline/test_pipeline.py",
    "tests/pipeline/test_no_network.py",
    "tests/runtime/test_torch.py",
    "tests/recover/test_recovery.py",
    "tests/recover/test_processes.py",
    "tests/docs/test_examples.py",
    "tests/test_gates.py",
)
"""Files that begin first: a worker that met one of them last would keep all others waiting."""


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--consumers", metavar="FILE", help="write what the tests marked consumer found")


_CONSUMERS = pytest.StashKey[list[dict[str, Any]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the outcome of a test that shows an artifact in the program it is made for."""
    report = yield
    if report.when == "call" or not report.passed:
        found = item.config.stash.setdefault(_CONSUMERS, [])
        for mark in item.iter_markers("consumer"):
            told = {"consumer": mark.args[0], **mark.kwargs, "test": item.nodeid, "outcome": report.outcome}
            if package := told.pop("package", None):
                told["version"] = _version_of(package)
            if report.skipped and isinstance(report.longrepr, tuple):
                told["reason"] = report.longrepr[2].removeprefix("Skipped: ")
            found.append(told)
    return report


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if file := session.config.getoption("--consumers"):
        Path(file).write_text(json.dumps(session.config.stash.get(_CONSUMERS, []), indent=1) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONGEST)))
    no_gpu = why_no_gpu() if any(item.get_closest_marker("gpu") for item in items) else None
    for item in items:
        if OTHER_TIERS.isdisjoint(mark.name for mark in item.iter_markers()):
            item.add_marker("unit")
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
        if item.get_closest_marker("gpu") and no_gpu is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {no_gpu}"))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Handlers end with the test that set them, as do those of ``main``, which is the end of a process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", params=list(KINDS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of each kind in turn; read-only."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tied Llama checkpoint folder; read-only."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama-tied")


@pytest.fixture
def tokens() -> NDArray[np.int64]:
    """[6, 20] random token ids."""
    return np.random.default_rng(3).integers(3, VOCABULARY, size=(6, 20))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file with little to learn in it."""
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    lines = (f"Day {n}: {n * 7919 % 1000} apples and {n * 104729 % 997} pears.\n" for n in range(400))
    file.write_text("".join(lines))
    return file
