"""Chat templates: programs of strangers, run in a child process with little memory and time.

transformers' sandbox keeps them from files and the interpreter, not from ``{{ 'a' * 10**10 }}``. The parent
sends one JSON request to ``python -m nirvana_deploy.model.text.chat`` and reads one JSON answer.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil

from nirvana_deploy.base.child import child_environment
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import cpu_seconds, limit_process, limits_are_enforced

MEMORY_BYTES = 256 << 20
"""What a template may allocate, beyond the interpreter and its libraries."""
CPU_SECONDS = 5
WALL_SECONDS = 60
"""Imports on a busy machine included."""
LOOK_SECONDS = 0.05
"""How often a child is looked after that no limit of the system holds."""
RESIDENT_BYTES = 1 << 30
"""What such a child may hold in memory, the interpreter and its libraries included."""
MOST_CHARACTERS = 1 << 20
"""What a template may write."""
_COPIES = 16
"""How often it may hold, and write, what it is given."""
_CONVERSATIONS_PER_SECOND = 50
_WITHOUT = "Leave --chat out: the prompt is continued as plain text."


def users_turn(tokenizer: Any, prompt: str) -> str:
    """``prompt`` as the user's turn, in the words of the chat template of ``tokenizer`` (of transformers).

    Raises NirvanaError with one sentence for a template that fails, or asks for more than its share of
    memory, time or text.
    """
    turn = [{"role": "user", "content": prompt}]
    return _rendered(tokenizer, [turn], answer_follows=True, hint=_WITHOUT)[0]


def written_out(tokenizer: Any, conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
    """Whole conversations (role and content of each turn) in the words of the chat template, one text each.

    Raises NirvanaError as :func:`users_turn` does.
    """
    return _rendered(tokenizer, conversations, answer_follows=False, hint="Give plain texts instead.")


def _rendered(
    tokenizer: Any, conversations: Sequence[Sequence[dict[str, str]]], *, answer_follows: bool, hint: str
) -> list[str]:
    request = {"conversations": list(conversations), **in_words_of(tokenizer, answer_follows, hint=hint)}
    answer = _asked(request)
    if "problem" in answer:
        raise NirvanaError(f"The chat template was refused: {answer['problem']}.", hint=hint)
    return list(answer["texts"])


def in_words_of(tokenizer: Any, answer_follows: bool, *, hint: str) -> dict[str, Any]:
    """What :func:`rendered` needs beside conversations; raises NirvanaError where no template is the one."""
    return {
        "chat_template": _template(tokenizer, hint),
        "add_generation_prompt": answer_follows,
        **tokenizer.special_tokens_map,
    }


def _template(tokenizer: Any, hint: str) -> str:
    """The template for a plain turn; raises NirvanaError if several are there and none is the default."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise NirvanaError(f"No chat template can be chosen: {_first_line(error)}.", hint=hint) from error
    return template


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", __spec__.name]
    piped: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=child_environment(), **piped) as child:
        try:
            answer, errors = _heard(child, json.dumps(request).encode())
        except _TakenTooMuchError as error:
            return {"problem": str(error)}
        finally:
            child.kill()
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        over = f"it took longer than {CPU_SECONDS} s of CPU time"
        return {"problem": over if name == "SIGXCPU" else f"it was ended by {name}"}
    if child.returncode:
        raise RuntimeError(errors.decode(errors="replace"))
    return dict(json.loads(answer))


class _TakenTooMuchError(Exception):
    """What a child takes more of than its share, as a sentence."""


def _heard(child: subprocess.Popen[bytes], request: bytes) -> tuple[bytes, bytes]:
    """What the child writes; raises _TakenTooMuchError for one that takes too long, or too much memory.

    The system keeps it from that, or this process looks after it where the system enforces no limits.
    """
    pause_s = WALL_SECONDS if limits_are_enforced() else LOOK_SECONDS
    end = time.monotonic() + WALL_SECONDS
    said: bytes | None = request
    while True:
        try:
            return child.communicate(said, timeout=pause_s)
        except subprocess.TimeoutExpired:
            said = None
            if time.monotonic() >= end:
                raise _TakenTooMuchError(f"it took longer than {WALL_SECONDS} s") from None
            if resident_bytes(child.pid) > RESIDENT_BYTES + _COPIES * len(request):
                raise _TakenTooMuchError("it needs too much memory") from None


def resident_bytes(process: int) -> int:
    """Memory that a process holds; 0 for one that has ended."""
    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """Render the request under the limits: ``texts``, or the ``problem``. Changes this process for good."""
    given = len(json.dumps(request["conversations"]))
    most_bytes = psutil.Process().memory_info().vms + MEMORY_BYTES + _COPIES * given
    seconds = CPU_SECONDS + len(request["conversations"]) // _CONVERSATIONS_PER_SECOND
    limit_process(mapped_bytes=most_bytes, cpu_seconds=int(cpu_seconds()) + seconds)
    return rendered(request)


def rendered(request: dict[str, Any]) -> dict[str, Any]:
    """Render the request under the limits of this process: ``texts``, or the ``problem``."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(**request)
    except MemoryError:
        return {"problem": f"it needs more than {MEMORY_BYTES >> 20} MB of memory"}
    except Exception as error:  # whatever a stranger's program raises is its own failure
        return {"problem": _first_line(error)}
    given = len(json.dumps(request["conversations"]))
    written, most = sum(map(len, texts)), max(MOST_CHARACTERS, _COPIES * given)
    if written > most:
        return {"problem": f"it writes {written:,} characters; the most is {most:,}"}
    return {"texts": texts}


def _first_line(error: Exception) -> str:
    words = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return words[:200].rstrip(".")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answered(json.load(sys.stdin))))
