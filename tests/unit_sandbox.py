"""Runs a program as a systemd unit would confine it: `python -m tests.unit_sandbox UNIT PROGRAM ARGUMENT...`.

A score says how tight a unit is, and nothing about whether its program still works inside. This puts the
process under what the unit says about system calls, capabilities, writable code and kinds of sockets,
through the library that systemd itself uses, and becomes the program. What needs a namespace (files,
devices, other processes) is left out.
"""

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | errno.EPERM
REFUSE_SOCKET = 0x00050000 | errno.EAFNOSUPPORT
EQUAL, MASKED_EQUAL = 4, 7

PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
NO_SUCH_CALL_HERE = -1  # libseccomp's answer for a name of another architecture

SOCKET_KINDS = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
MOST_SOCKET_KINDS = 64
PROT_WRITE, PROT_EXEC = 2, 4


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


class Filter:
    """A filter of system calls."""

    def __init__(self, otherwise: int) -> None:
        """otherwise: what becomes of calls without a rule."""
        self._library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(ctypes.c_uint32(otherwise)))

    def rule(self, action: int, call: str, *comparisons: _Comparison) -> None:
        """Decide what becomes of a call whose arguments are such. Unknown calls are passed over."""
        number = self._library.seccomp_syscall_resolve_name(call.encode())
        if number == NO_SUCH_CALL_HERE:
            return
        array = (_Comparison * len(comparisons))(*comparisons)
        done = self._library.seccomp_rule_add_array(
            self._context, ctypes.c_uint32(action), number, len(comparisons), array
        )
        if done < 0:
            raise OSError(-done, f"no rule for {call}: {os.strerror(-done)}")

    def load(self) -> None:
        """Put this process and its children under the filter, for ever."""
        done = self._library.seccomp_load(self._context)
        if done < 0:
            raise OSError(-done, f"no filter: {os.strerror(-done)}")


def directives(unit: Path) -> dict[str, list[str]]:
    """Return the values of each directive of a unit, in order; the sections are taken together."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith(("#", "[")):
            found.setdefault(name, []).append(value)
    return found


def calls_of(group: str) -> set[str]:
    """Return the system calls in a group like @system-service, or the name itself if it is no group."""
    if not group.startswith("@"):
        return {group}
    listing = subprocess.run(
        ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True
    ).stdout
    names = [line.strip() for line in listing.splitlines()[1:] if line.strip() and "#" not in line]
    return set().union(*(calls_of(name) for name in names))


def confine(unit: Path) -> None:
    """Put this process under what the unit says."""
    said = directives(unit)
    process = ctypes.CDLL(None, use_errno=True)
    if said["CapabilityBoundingSet"] == [""]:
        last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
        for capability in range(last + 1):
            process.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for who has none to lose
    if said["NoNewPrivileges"] == ["true"]:
        process.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

    arguments = Filter(ALLOW)
    if said["MemoryDenyWriteExecute"] == ["true"]:
        both = PROT_WRITE | PROT_EXEC
        arguments.rule(REFUSE, "mmap", _Comparison(2, MASKED_EQUAL, both, both))
        for call in ("mprotect", "pkey_mprotect"):
            arguments.rule(REFUSE, call, _Comparison(2, MASKED_EQUAL, PROT_EXEC, PROT_EXEC))
    (kinds,) = said["RestrictAddressFamilies"]
    for number in set(range(MOST_SOCKET_KINDS)) - {SOCKET_KINDS[kind] for kind in kinds.split()}:
        arguments.rule(REFUSE_SOCKET, "socket", _Comparison(0, EQUAL, number, 0))
    arguments.load()

    allowed: set[str] = set()
    for value in said["SystemCallFilter"]:
        named = set().union(*(calls_of(group) for group in value.lstrip("~").split()))
        allowed = allowed - named if value.startswith("~") else allowed | named
    calls = Filter(REFUSE)
    for call in sorted(allowed | calls_of("@default") | {"execve"}):  # the last two always are
        calls.rule(ALLOW, call)
    calls.load()


if __name__ == "__main__":
    confine(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
