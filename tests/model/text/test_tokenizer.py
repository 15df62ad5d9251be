"""A tokenizer leaves nothing behind: a process that loads one after the other does not grow."""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path

import pytest
from builders.tiny import write_tiny

from nirvana_deploy.model.text.tokenizer import tokenizer_in


class _Allocated(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in names.split())


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc how much is allocated")
def test_a_tokenizer_that_is_gone_keeps_no_memory(tmp_path: Path) -> None:
    """tokenizers 0.23.3 keeps the words that it has read: here 1 MB of them without the cure."""
    allocated = ctypes.CDLL(None).mallinfo2
    allocated.restype = _Allocated
    folder = write_tiny(tmp_path / "model", "llama-tied")
    words = " ".join(map("".join, itertools.product("abcdefgh", repeat=4)))
    used = []
    for _ in range(2):
        tokenizer = tokenizer_in(folder)
        assert len(tokenizer(words)["input_ids"]) > 10_000
        del tokenizer
        used.append(allocated().uordblks)
    assert used[1] - used[0] < 300_000
