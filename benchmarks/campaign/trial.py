"""One trial: a command in a child with limits, and what is wrong with how it ended.

The parent has imported everything and runs one thread (:func:`warm` checks it): a fork of it is as good as a
new process, and costs no import.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import pkgutil
import re
import resource
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nirvana_deploy.base.errors import UNFORESEEN

CODES = frozenset({0, 1, 2, 3, 4, 130})
"""How a command may end: done, the user's problem, usage, verification, less than was asked, interrupted."""
MESSAGE_LINES, MESSAGE_CHARACTERS = 10, 2000
CPU_SECONDS, WALL_SECONDS, IDLE_SECONDS = 60, 300, 20
MEMORY_BYTES = 3 << 30
"""Address space beyond what the imports take."""
_GONE_SECONDS = 30
_CAPSET, _VERSION_3, _OVERRIDES = 126 if os.uname().machine == "x86_64" else 91, 0x20080522, {1, 2, 3}


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    words: tuple[str, ...]
    code: int
    """Its exit code; the negative number of the signal that ended it."""
    stdout: str
    stderr: str
    hung: str
    """Why it had to be ended; empty if it ended by itself."""
    pid: int
    left: tuple[int, ...]
    """Processes that outlived it."""
    seconds: float

    def complaints(self, *, allowed: frozenset[int] = CODES) -> list[str]:
        """What the property says against it, a sentence each."""
        found = [self.hung] if self.hung else []
        if self.code not in allowed and not self.hung:
            found.append(f"ended with {_name_of(self.code)}")
        for text in (self.stdout, self.stderr):
            if "Traceback (most recent call last)" in text:
                found.append(f"a trace: {_cause(text)}")
            if UNFORESEEN in text:
                found.append(f"a failure that nobody foresaw: {text.partition(UNFORESEEN)[2].strip()[:300]}")
        lines = self.stderr.splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
        message = lines[starts[0] :] if starts else []
        if len(starts) > 1:
            found.append("more than one message")
        if len(message) > MESSAGE_LINES or sum(map(len, message)) > MESSAGE_CHARACTERS:
            found.append(f"a message of {len(message)} lines, {sum(map(len, message))} characters")
        if (self.code in {1, 2, 3}) != bool(starts) and self.code in CODES:
            found.append(f"exit code {self.code} with{'' if starts else 'out'} a message")
        if self.left:
            found.append(f"{len(self.left)} processes left")
        return found


def warm() -> None:
    """Import whatever a command may import; raises RuntimeError if that started a thread."""
    import nirvana_deploy

    for module in pkgutil.walk_packages(nirvana_deploy.__path__[:1], "nirvana_deploy."):
        if not module.name.endswith(("__main__", ".recover.training")):
            importlib.import_module(module.name)
    importlib.import_module("nirvana_deploy.cli.main")
    for name in (
        "onnxruntime_genai",
        "gguf",
        "matplotlib.pyplot",
        "transformers.models.llama",
        "tensorrt_rtx",
    ):
        with suppress(ImportError):
            importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise RuntimeError(f"the imports started {threads - 1} threads: forks of this process prove nothing")
    gc.collect()
    gc.freeze()  # children that collect garbage copy none of it


def run(
    *words: str,
    folder: Path,
    prepare: Callable[[], None] = lambda: None,
    kill: tuple[float, int] | None = None,
) -> Outcome:
    """Run the command ``words`` in ``folder``; ``prepare`` is called in its process first.

    ``kill`` (seconds, signal) sends a signal after a while, an interrupt to its children too, as a terminal.
    """

    def command() -> None:
        from nirvana_deploy.cli.main import main

        sys.argv = ["nirvana-deploy", *words]
        prepare()
        main()

    return call(command, words=words, folder=folder, kill=kill)


def call(
    work: Callable[[], None],
    *,
    folder: Path,
    words: tuple[str, ...] = (),
    kill: tuple[float, int] | None = None,
    limited: bool = True,
) -> Outcome:
    """Run a function in a child; what it prints lies beside ``folder`` meanwhile."""
    pid, started = start(work, folder=folder, limited=limited), time.monotonic()
    return finished(pid, started, folder=folder, words=words, kill=kill, limited=limited)


def start(work: Callable[[], None], *, folder: Path, name: str = "", limited: bool = True) -> int:
    """Begin a child and return its process id; pass it to :func:`finished`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for number, way in (
            (0, "/dev/null"),
            (1, _printed(folder, name, "out")),
            (2, _printed(folder, name, "err")),
        ):
            file = os.open(way, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, number)
            os.close(file)
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limited:
            most_bytes = _size_bytes() + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):  # what an interpreter does at its end
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def finished(
    pid: int,
    started: float,
    *,
    folder: Path,
    name: str = "",
    words: tuple[str, ...] = (),
    kill: tuple[float, int] | None = None,
    limited: bool = True,
) -> Outcome:
    """Wait for a child, and for its children."""
    hung, busy, used = "", started, 0
    alive = Path(_printed(folder, name, "err"))
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        now = time.monotonic()
        if kill is not None and not alive.exists():
            started = now
        elif kill is not None and now >= started + kill[0]:
            (os.killpg if kill[1] == signal.SIGINT else os.kill)(pid, kill[1])
            kill = None
        if limited and now > busy + 1 and (used != (used := _ticks(pid))):
            busy = now
        if limited and (now > started + WALL_SECONDS or now > busy + IDLE_SECONDS):
            hung = f"hung: no end after {now - started:.0f} s"
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01 if now < started + 2 else 0.05)
    seconds = time.monotonic() - started
    left = () if hung else tuple(_left(pid))
    for one in _session(pid):
        with suppress(OSError):
            os.kill(one, signal.SIGKILL)
    texts = [Path(_printed(folder, name, way)) for way in ("out", "err")]
    said = [text.read_bytes().decode(errors="replace") for text in texts]
    for text in texts:
        text.unlink()
    return Outcome(words, os.waitstatus_to_exitcode(ended[1]), *said, hung, pid, left, seconds)


def at_event(number: int, folder: Path, act: Callable[[], None]) -> Callable[[], None]:
    """What to ``prepare``: ``act`` just before the ``number``-th change of a file in ``folder``, from 1."""
    count = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in _CHANGES and _changes(event, arguments, str(folder)):
            count += 1
            if count == number:
                act()

    return lambda: sys.addaudithook(watch)


_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _changes(event: str, arguments: tuple[object, ...], folder: str) -> bool:
    path, flags = arguments[0], arguments[-1]
    if not isinstance(path, (str, os.PathLike)) or not str(Path(path).absolute()).startswith(folder):
        return False
    return event != "open" or (isinstance(flags, int) and bool(flags & _WRITES))


def obey_permissions() -> None:
    """Let file modes bind this process even if it runs as root."""
    if os.geteuid():
        return
    keep = ~sum(1 << number for number in _OVERRIDES)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    low, high = keep & 0xFFFFFFFF, 0xFFFFFFFF
    header, libc = struct.pack("Ii", _VERSION_3, 0), ctypes.CDLL(None, use_errno=True)
    now = ctypes.create_string_buffer(24)
    if libc.syscall(_CAPSET - 1, header, now):  # capget
        raise OSError(ctypes.get_errno(), "capget")
    old = struct.unpack("6I", now.raw[:24])
    new = [value & (low if index < 3 else high) for index, value in enumerate(old)]
    if libc.syscall(_CAPSET, header, struct.pack("6I", *new)):
        raise OSError(ctypes.get_errno(), "capset")


def _cause(text: str) -> str:
    """The exception of a trace, and the last place of this package in it."""
    places = re.findall(r'File ".*/((?:nirvana_deploy|cli)/[^"]+)", line (\d+)', text)
    lines = [line for line in text.splitlines() if re.match(r"\w[\w.]*(: |$)", line)]
    return f"{lines[-1][:160] if lines else ''} at {':'.join(places[-1]) if places else 'an unknown place'}"


def _printed(folder: Path, name: str, way: str) -> str:
    return f"{folder}.{name}{way}"


def _name_of(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _size_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _session(leader: int) -> Iterator[int]:
    """Processes of a session that still run."""
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, session = (place / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                yield int(place.name)


def _ticks(leader: int) -> int:
    """CPU time that a session has used; a process that waits for the CPU counts as busy."""
    total = 0
    for pid in _session(leader):
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12]) + (time.monotonic_ns() if fields[0] == "R" else 0)
    return total


def _left(leader: int) -> list[int]:
    """Processes of a session that its leader's end has not ended, after a while."""
    until = time.monotonic() + _GONE_SECONDS
    while (found := list(_session(leader))) and time.monotonic() < until:
        time.sleep(0.05)
    return found
