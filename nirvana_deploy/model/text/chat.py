"""Chat templates: programs of strangers, run in a child process with little memory and time.

transformers' sandbox keeps them from files and the interpreter, not from ``{{ 'a' * 10**10 }}``. The parent
sends one JSON request to ``python -m nirvana_deploy.model.text.chat`` and reads one JSON answer.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import psutil

from nirvana_deploy.base.child import child_environment
from nirvana_deploy.base.errors import NirvanaError

MEMORY_BYTES = 256 << 20
"""What a template may allocate, beyond the interpreter and its libraries."""
CPU_SECONDS = 5
_WALL_SECONDS = 60
"""Imports on a busy machine included."""
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
    request = {
        "conversations": list(conversations),
        "chat_template": _template(tokenizer, hint),
        "add_generation_prompt": answer_follows,
        **tokenizer.special_tokens_map,
    }
    answer = _asked(request)
    if "problem" in answer:
        raise NirvanaError(f"The chat template was refused: {answer['problem']}.", hint=hint)
    return list(answer["texts"])


def _template(tokenizer: Any, hint: str) -> str:
    """The template for a plain turn; raises NirvanaError if several are there and none is the default."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise NirvanaError(f"No chat template can be chosen: {_first_line(error)}.", hint=hint) from error
    return template


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", __spec__.name]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            env=child_environment(),
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"it took longer than {_WALL_SECONDS} s"}
    if done.returncode == -signal.SIGXCPU:
        return {"problem": f"it took longer than {CPU_SECONDS} s of CPU time"}
    if done.returncode < 0:
        return {"problem": f"it was ended by {signal.Signals(-done.returncode).name}"}
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """Render the request under the limits: ``texts``, or the ``problem``. Changes this process for good."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given = len(json.dumps(request["conversations"]))
    most_bytes = psutil.Process().memory_info().vms + MEMORY_BYTES + _COPIES * given
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = CPU_SECONDS + len(request["conversations"]) // _CONVERSATIONS_PER_SECOND
    most_seconds = int(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (most_seconds, most_seconds + 1))
    try:
        texts, _ = render_jinja_template(**request)
    except MemoryError:
        return {"problem": f"it needs more than {MEMORY_BYTES >> 20} MB of memory"}
    except Exception as error:  # whatever a stranger's program raises is its own failure
        return {"problem": _first_line(error)}
    written, most = sum(map(len, texts)), max(MOST_CHARACTERS, _COPIES * given)
    if written > most:
        return {"problem": f"it writes {written:,} characters; the most is {most:,}"}
    return {"texts": texts}


def _first_line(error: Exception) -> str:
    words = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return words[:200].rstrip(".")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answered(json.load(sys.stdin))))
