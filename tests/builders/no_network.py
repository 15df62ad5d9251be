"""Run a command that dies when it, or a child of it, opens a socket to the network.

``python no_network.py COMMAND ...`` installs a filter of system calls (seccomp, no privileges needed) and
becomes the command. A socket of the family AF_INET, or one of AF_INET6 for datagrams (a name is looked up),
ends the process with SIGSYS, whichever language asked for it. Other IPv6 sockets pass: urllib3 tries one.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct
import sys

SOCKET_CALLS = {"x86_64": 41, "aarch64": 198}
"""Number of the system call ``socket(family, type, protocol)`` by machine."""
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000


def available() -> bool:
    """Whether this machine has such filters."""
    return sys.platform == "linux" and platform.machine() in SOCKET_CALLS


def command(*words: str) -> list[str]:
    """What to run instead of ``words``."""
    return [sys.executable, __file__, *words]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def _forbid() -> None:
    steps = [  # (operation, steps to skip if equal, if not, operand)
        (_LOAD, 0, 0, 0),  # number of the call
        (_EQUAL, 0, 6, SOCKET_CALLS[platform.machine()]),
        (_LOAD, 0, 0, 16),  # family
        (_EQUAL, 5, 0, int(socket.AF_INET)),
        (_EQUAL, 0, 3, int(socket.AF_INET6)),
        (_LOAD, 0, 0, 24),  # type, with flags above its four bits
        (_AND, 0, 0, 0xF),
        (_EQUAL, 1, 0, int(socket.SOCK_DGRAM)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _KILL_PROCESS),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = _Program(len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    _forbid()
    os.execv(sys.argv[1], sys.argv[1:])
