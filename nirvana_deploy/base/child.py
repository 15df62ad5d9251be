"""Child processes that run this package.

``python -m nirvana_deploy.base.child WORDS`` is ``nirvana-deploy WORDS`` that ends as by SIGTERM when its
input ends, also where the parent was killed.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import nirvana_deploy
from nirvana_deploy.base.errors import NirvanaError

KEY_VARIABLE = "NIRVANA_DEPLOY_API_KEY"
"""Holds the bearer token that requests to a server must show, if any; no child needs it."""
_STDERR_TAIL_BYTES = 2000


def child_environment() -> dict[str, str]:
    """This process's environment with this package first on PYTHONPATH, to run the same code anywhere."""
    ours = str(Path(nirvana_deploy.__file__).resolve().parent.parent)
    paths = os.pathsep.join(path for path in (ours, os.environ.get("PYTHONPATH")) if path)
    kept = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    return {**kept, "PYTHONPATH": paths}


def died(process: subprocess.Popen[bytes], stderr: IO[bytes], *, what: str) -> NirvanaError:
    """Return the error for a process that stopped answering, with the last words of its ``stderr``."""
    process.kill()  # nothing to do when it has ended by itself
    code = process.wait()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _STDERR_TAIL_BYTES))
    words = stderr.read().decode(errors="replace").strip() or "nothing"
    hint = "A SIGKILL that nobody sent usually means that memory ran out." if code == -9 else None
    return NirvanaError(f"{what} {how}. It last said: {words}", hint=hint)


def _end_with_input() -> None:
    stdin = sys.stdin.fileno()
    while os.read(stdin, 4096):  # below Python's buffers, whose lock would outlive the main thread
        pass
    signal.raise_signal(signal.SIGTERM)


def main() -> None:
    """Run the command that the words on the command line make."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    runpy.run_module("nirvana_deploy", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
