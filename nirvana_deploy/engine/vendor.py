"""TensorRT's builder seen from Python: its log, its progress, and the stream it writes into.

The classes of ``tensorrt`` and ``tensorrt_rtx`` are the same by name, so everything here takes the module as
an argument and subclasses what it has: the interfaces that TensorRT calls back.

TensorRT keeps one logger a process: while any builder or runtime lives, the first one's is used for all. Each
build drops its objects before it returns, so that the next one is heard.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from nirvana_deploy.base.errors import NirvanaError, pip_install
from nirvana_deploy.base.progress import Advance

PROGRESS_STEPS = 1000
_OLDEST_TENSORRT = (10, 15)
"""First with layers for Attention (10.14), RotaryEmbedding and TensorScatter (10.15), by its bindings."""
_EXPLAINED = (
    (
        r"Make sure input .* has Int64 binding",
        "token ids, masks and positions are int64: bind buffers of 8 bytes a value",
    ),
    (r"is unsupported in TensorRT-RTX", "an option that RTX does not have was read; nothing is lost"),
    (r"logger passed into .* differs", "another builder or runtime is alive; the log went to its logger"),
    (r"Thread context has not been set", "a message of the builder about its own logging"),
    (r"[Uu]nused [Ii]nput", "the graph has an input that no layer reads"),
    (r"timing cache", "kernels are timed when the engine first runs, not here"),
)


@dataclass
class BuilderLog:
    """Everything that a builder said, in order."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    """(severity, message)."""

    def text(self) -> str:
        """The log as a file: one message a paragraph, its severity before it; the chatty ones left out."""
        return "".join(
            f"[{severity}] {message}\n" for severity, message in self.lines if severity != "VERBOSE"
        )

    def warnings(self) -> tuple[str, ...]:
        """Each distinct warning once, the names of tensors left out, with what it means where known."""
        found = dict.fromkeys(_general(m) for severity, m in self.lines if severity == "WARNING")
        return tuple(f"{message}{_meaning(message)}" for message in found)

    def reason(self) -> str:
        """The first error, in one line; what followed it is in the log."""
        errors = [m for severity, m in self.lines if severity in ("ERROR", "INTERNAL_ERROR")]
        told = [m for m in errors if "Begin node" not in m and "End node" not in m] or errors
        return " ".join(told[0].split())[:400].rstrip(".") if told else "it gave no reason"

    def mentions(self, text: str) -> bool:
        """Whether an error holds ``text``."""
        return any(text in m for severity, m in self.lines if severity in ("ERROR", "INTERNAL_ERROR"))


def require_builder(runtime: str, installed: str) -> None:
    """Refuse a TensorRT whose parser does not know the operators of our graphs."""
    major, minor = (int(part) for part in installed.split(".")[:2])
    if runtime == "tensorrt" and (major, minor) < _OLDEST_TENSORRT:
        oldest = ".".join(map(str, _OLDEST_TENSORRT))
        raise NirvanaError(
            f"TensorRT {installed} has no layers for Attention and RotaryEmbedding, which these graphs are "
            f"made of; {oldest} and newer have.",
            hint=f"{pip_install()} 'tensorrt>={oldest}'",
        )


def make_logger(trt: Any, log: BuilderLog) -> Any:
    """A logger of TensorRT that appends to ``log`` and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.lines.append((severity.name, message))

    return Logger()


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """The builder's nested phases as one number: how much of the build is behind it.

    A phase counts its own finished steps and, for the step it is in, the share of the phase within.
    """

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Enter a phase of so many steps."""
        self._phases[name] = _Phase(parent, max(1, steps))

    def step(self, name: str) -> None:
        """One step of a phase is finished."""
        if name in self._phases:
            self._phases[name].done += 1

    def finish(self, name: str) -> None:
        """Leave a phase."""
        self._phases.pop(name, None)

    def share(self) -> float:
        """Of the outermost phase, 0 to 1."""
        roots = [name for name, phase in self._phases.items() if phase.parent not in self._phases]
        return self._share(roots[0]) if roots else 0.0

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        within = max((self._share(n) for n, p in self._phases.items() if p.parent == name), default=0.0)
        return min(1.0, (phase.done + min(within, 0.999)) / phase.steps)


def make_monitor(trt: Any, advance: Advance, errors: list[BaseException]) -> Any:
    """A progress monitor that advances a task of PROGRESS_STEPS, and ends the build once there are errors."""
    phases, told = PhaseTree(), [0]

    def tell() -> None:
        reached = int(PROGRESS_STEPS * phases.share())
        if reached > told[0]:
            advance(reached - told[0])
            told[0] = reached

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:  # an exception must not travel through the builder's C++
                phases.step(phase_name)
                tell()
            except BaseException as error:
                errors.append(error)
            return not errors

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def make_writer(trt: Any, file: BinaryIO, errors: list[BaseException]) -> Any:
    """A stream that the builder writes the engine into, so that it is never whole in memory twice."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                errors.append(error)
                return 0

    return Writer()


def _general(message: str) -> str:
    """A warning without the place in TensorRT's source and the tensor it is about."""
    bare = re.sub(r"^\w+\.cpp:\d+: ", "", " ".join(message.split()))
    return re.sub(r"(input|tensor|node) [\w./:]+", r"\1 ...", bare)


def _meaning(message: str) -> str:
    meaning = next((text for pattern, text in _EXPLAINED if re.search(pattern, message)), None)
    return f" ({meaning})" if meaning else ""
