"""One variant in one process: both ends of the pipe, and the stop-watch.

Each variant has its own process for the whole benchmark: its peak memory is its own, and variants can take
turns. The parent writes one JSON request per line; the child
(``python -m nirvana_deploy.measure.worker PATH --threads N``) answers each with one JSON line and is blocked
in ``read`` in between. End of input ends the child, also when the parent was killed.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import psutil
from numpy.typing import NDArray

from nirvana_deploy.base.child import child_environment, died
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import peak_rss_bytes
from nirvana_deploy.base.units import format_ms
from nirvana_deploy.runtime.runner import OnDevice, Runner


@dataclass(frozen=True)
class RoundSample:
    """One timed request: a prompt, then ``new_tokens`` greedy tokens."""

    prefill_ms: float
    """The forward pass over the prompt; of an encoder-decoder, the encoder and the decoder's first step."""
    ttft_ms: float
    """Request start to the first token's id."""
    itl_ms: tuple[float, ...]
    """Gaps between consecutive tokens: ``new_tokens - 1`` of them."""
    device_ms: tuple[float, ...] | None = None
    """GPU compute time per pass, prefill first, without copies and host; None if the runtime doesn't tell."""

    def __post_init__(self) -> None:
        """Raise NirvanaError for an interval that is negative: the clock was set back meanwhile."""
        least_ms = min(self.prefill_ms, self.ttft_ms, *self.itl_ms)
        if least_ms < 0:
            raise NirvanaError(
                f"The clock went back by {format_ms(-least_ms)} while a request was timed; its times mean "
                "nothing.",
                hint="Measure again, while nothing sets the clock: nirvana-deploy benchmark OUT",
            )

    @property
    def e2e_ms(self) -> float:
        """Request start to the last token's id: TTFT and all gaps."""
        return self.ttft_ms + sum(self.itl_ms)

    @property
    def tpot_ms(self) -> float:
        """(end to end - TTFT) / (new tokens - 1)."""
        return sum(self.itl_ms) / len(self.itl_ms)


def timed_round(
    runner: Runner,
    tokens: NDArray[np.int64],
    *,
    new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> RoundSample:
    """Time one greedy request: ``tokens`` [N, T] in, ``new_tokens`` (at least 2) out per sequence."""
    start = clock()
    logits, state = runner.prefill(tokens)
    prefilled = clock()
    token = logits[:, -1].argmax(axis=-1)
    stamps = [clock()]
    for _ in range(new_tokens - 1):
        logits, state = runner.decode(token[:, None], state)
        token = logits[:, -1].argmax(axis=-1)
        stamps.append(clock())
    return RoundSample(
        prefill_ms=1e3 * (prefilled - start),
        ttft_ms=1e3 * (stamps[0] - start),
        itl_ms=tuple(1e3 * float(gap) for gap in np.diff(stamps)),
    )


@dataclass(frozen=True)
class Loaded:
    """A worker's first answer, once its model is loaded."""

    runtime: str
    threads: int
    vocab_size: int
    load_ms: float
    interpreter_rss_bytes: int
    """Resident before the model: the interpreter and the runtime's libraries."""
    loaded_rss_bytes: int
    """Resident after loading, before the first request."""


class WorkerProcess:
    """The parent's end: a context manager that ends the process with its block.

    Raises NirvanaError when the model cannot be loaded, or when the process dies; its last words are in
    the message.
    """

    program: tuple[str, ...] = ("-P", "-m", __spec__.name)
    """The child's end, for Python."""
    loaded: Loaded
    peak_rss_bytes: int
    """As of the last answer."""
    peak_device_bytes: int | None
    """The same for the runtime's device; None for the CPU, or if unknown."""

    def __init__(self, name: str, path: Path, *, threads: int | None, runtime: str | None = None) -> None:
        self._name = name
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        command = [sys.executable, *self.program, str(path.absolute())]
        command += ["--threads", str(threads)] if threads is not None else []
        command += ["--runtime", runtime] if runtime is not None else []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=child_environment(),
        )

    def __enter__(self) -> WorkerProcess:
        try:
            self.loaded = Loaded(**self._answer())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def measure(self, tokens: NDArray[np.int64], *, new_tokens: int) -> RoundSample:
        """Have the worker run ``timed_round`` on [N, T] tokens."""
        assert self._process.stdin is not None
        request = json.dumps({"tokens": tokens.tolist(), "new_tokens": new_tokens})
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # a closed pipe: EPIPE, or EINVAL on Windows
            raise self._died() from None
        answer = self._answer()
        device_ms = answer["device_ms"]
        return RoundSample(
            prefill_ms=answer["prefill_ms"],
            ttft_ms=answer["ttft_ms"],
            itl_ms=tuple(answer["itl_ms"]),
            device_ms=None if device_ms is None else tuple(device_ms),
        )

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise NirvanaError(f"{self._name}: {answer['error']}", hint=answer["hint"])
        self.peak_rss_bytes = answer.pop("peak_rss_bytes")
        self.peak_device_bytes = answer.pop("peak_device_bytes")
        return answer

    def _died(self) -> NirvanaError:
        return died(self._process, self._stderr, what=f"The worker of {self._name!r}")

    def _end(self) -> None:
        """Kill the process, busy or idle; it holds nothing to lose."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            assert pipe is not None
            with suppress(OSError):  # an unsent request
                pipe.close()


def serve(
    path: Path, *, threads: int | None, runtime: str | None = None, requests: IO[str], answers: IO[str]
) -> None:
    """Load an ONNX folder or an engine and answer requests until they end: the child's end."""

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        # imported here: the parent needs no runtime, and a missing one is an answer like any other
        from nirvana_deploy.runtime.registry import open_runner

        process = psutil.Process()
        interpreter_rss_bytes = process.memory_info().rss
        start = time.perf_counter()
        runner = open_runner(path, runtime=runtime, threads=threads)
        load_ms = 1e3 * (time.perf_counter() - start)
    except NirvanaError as error:
        say(error=error.message, hint=error.hint)
        return
    device = runner if isinstance(runner, OnDevice) else None

    def peaks() -> dict[str, int | None]:
        device_bytes = None if device is None else device.peak_device_bytes()
        return {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": device_bytes}

    loaded = Loaded(
        runtime=runner.runtime,
        threads=runner.threads,
        vocab_size=runner.vocab_size,
        load_ms=load_ms,
        interpreter_rss_bytes=interpreter_rss_bytes,
        loaded_rss_bytes=process.memory_info().rss,
    )
    say(**asdict(loaded), **peaks())
    for line in requests:
        request = json.loads(line)
        tokens = np.array(request["tokens"], dtype=np.int64)
        try:
            sample = timed_round(runner, tokens, new_tokens=request["new_tokens"])
        except NirvanaError as error:  # a prompt that an engine's profiles do not take, for one
            say(error=error.message, hint=error.hint)
            return
        if device is not None:
            sample = replace(sample, device_ms=device.device_ms())
        say(**asdict(sample), **peaks())


def main() -> None:
    """Run the child's end on stdin and stdout."""
    parser = argparse.ArgumentParser(prog="python -m nirvana_deploy.measure.worker", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runtime")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # they are the parent's, which ends this process
        signal.signal(number, signal.SIG_IGN)
    serve(
        options.path,
        threads=options.threads,
        runtime=options.runtime,
        requests=sys.stdin,
        answers=sys.stdout,
    )


if __name__ == "__main__":
    main()
