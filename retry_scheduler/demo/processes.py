"""Starts, stops, crashes and freezes a server with all its children, and leaves none of them behind.

Knows processes, and nothing of PostgreSQL or RabbitMQ. Linux only: it reads /proc.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

# A server is looked at this often: it costs a file read or a connection, and delays each start by half of it.
LOOK_EVERY = timedelta(milliseconds=10)

# For the kernel to take down what was sent SIGKILL. Only a hung disk needs more than milliseconds.
KILL_TAKES = timedelta(seconds=10)

# Children of a server that has shut down end by themselves, when they notice. Later ones are killed.
CHILDREN_TAKE = timedelta(seconds=3)

# Waits for the end of its standard input, which only the owner holds open: the owner's end, however it
# comes. SIGCONT after it, because a frozen process takes no other signal than SIGKILL.
WATCH = 'read -r _; kill -s "$1" "$2"; kill -s CONT "$2"'


class PrivateServerError(Exception):
    """A private server did not come up, ended by itself, or refused a command."""


class ServerMissing(PrivateServerError):
    """The server's programs are not installed. The message names the command that installs them."""


def wait_until(condition: Callable[[], bool], *, within: timedelta, what: str) -> None:
    """Return as soon as `condition` is true; `what` completes the sentence "waited N s for ...".

    Raises PrivateServerError when the time is over.
    """
    deadline = time.monotonic() + within.total_seconds()
    while not condition():
        if time.monotonic() > deadline:
            raise PrivateServerError(f"waited {within.total_seconds():g} s for {what}")
        time.sleep(LOOK_EVERY.total_seconds())


def is_running(pid: int) -> bool:
    """Tell whether the process exists and has not ended (a zombie has)."""
    return _state_and_parent(pid)[0] not in "ZX"


def descendants(pid: int) -> list[int]:
    """Return the running children of `pid`, their children and so on, in no promised order."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            state, parent = _state_and_parent(int(folder.name))
            if state not in "ZX":
                children.setdefault(parent, []).append(int(folder.name))
    found: list[int] = []
    to_visit = [pid]
    while to_visit:
        nearest = children.get(to_visit.pop(), [])
        found += nearest
        to_visit += nearest
    return found


@dataclass(frozen=True)
class Account:
    """The user and group a server runs as, where that is not our own."""

    uid: int
    gid: int


@dataclass
class ServerProcess:
    """One server: the process that was started and everything that it starts.

    It gets a session of its own, so that a Ctrl-C in the terminal reaches us alone and we stop the
    servers in order. If we end without stopping it, even by SIGKILL, a watcher (a shell that blocks on a
    pipe) sends it `orphan_signal`. The kernel's parent-death signal would not do: it comes when the
    *thread* that started the server ends, is forgotten when the server changes its user, and is not
    passed on to grandchildren.
    """

    command: Sequence[str | Path]
    folder: Path  # the working directory
    output: Path  # standard output and error are appended to this file
    environment: Mapping[str, str]
    account: Account | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    orphan_signal: signal.Signals = signal.SIGKILL
    _server: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _watcher: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def pid(self) -> int:
        """The process id; of the last run, if the server is not running.

        Raises PrivateServerError before the first start.
        """
        if self._server is None:
            raise PrivateServerError(f"{self.command[0]} was never started")
        return self._server.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process was started and has not ended since. A frozen one is alive."""
        return self._server is not None and self._server.poll() is None

    def start(self) -> None:
        """Start the process, without waiting until it can serve.

        Raises PrivateServerError if it is running already.
        """
        if self.is_alive:
            raise PrivateServerError(f"{self.command[0]} is running already, process {self.pid}")
        self.kill()  # the remains of one that ended by itself
        with self.output.open("ab") as output:
            self._server = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=dict(self.environment),
                start_new_session=True,
                umask=0o077,
                user=self.account.uid if self.account else None,
                group=self.account.gid if self.account else None,
                extra_groups=[] if self.account else None,
            )
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", WATCH, "sh", self.orphan_signal.name.removeprefix("SIG"), str(self.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def wait_until_serving(self, serves: Callable[[], bool], *, within: timedelta) -> None:
        """Return when `serves` is true.

        Raises PrivateServerError with the end of the output if the process ends or the time is over.
        """
        try:
            wait_until(
                lambda: not self.is_alive or serves(), within=within, what=f"{self.command[0]} to come up"
            )
            if not self.is_alive:
                raise PrivateServerError(f"{self.command[0]} ended while starting")
        except PrivateServerError as error:
            said = self.output.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise PrivateServerError(f"{error}. The end of its output:\n{said}") from error

    def stop(self, *, within: timedelta) -> None:
        """Ask the server to shut down, and wait until it and its children are gone.

        One that takes longer than `within` is killed. Harmless if it is not running.
        """
        if self._server is None or not self.is_alive:
            self._forget_watcher()
            return
        self.thaw()
        family = descendants(self.pid)
        self._server.send_signal(self.stop_signal)
        try:
            self._server.wait(within.total_seconds())
        except subprocess.TimeoutExpired:
            self.kill()
        with suppress(PrivateServerError):
            _wait_for_the_end(family, within=CHILDREN_TAKE)
        _send(signal.SIGKILL, [pid for pid in family if is_running(pid)])
        self._forget_watcher()

    def kill(self) -> None:
        """End the server and its children at once with SIGKILL: a crash. Harmless if it is not running."""
        if self._server is not None and self.is_alive:
            family = self._freeze_family()  # a frozen family cannot grow while it is being killed
            _send(signal.SIGKILL, family)
            self._server.wait(KILL_TAKES.total_seconds())
            _wait_for_the_end(family, within=KILL_TAKES)
        self._forget_watcher()

    def freeze(self) -> None:
        """Stop the server and its children where they are: connections stay open and fall silent.

        Raises PrivateServerError if it is not running.
        """
        if not self.is_alive:
            raise PrivateServerError(f"{self.command[0]} is not running")
        self._freeze_family()

    def thaw(self) -> None:
        """Let a frozen server go on. Harmless if it is not frozen or not running."""
        if self.is_alive:
            _send(signal.SIGCONT, [*descendants(self.pid), self.pid])

    def _freeze_family(self) -> list[int]:
        family: list[int] = []
        new = [self.pid]
        while new:  # until a look finds no child that was born since the look before
            _send(signal.SIGSTOP, new)
            family += new
            new = [pid for pid in descendants(self.pid) if pid not in family]
        return family

    def _forget_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.communicate()  # closes our end of the pipe, and reaps
            self._watcher = None


def _wait_for_the_end(pids: Sequence[int], *, within: timedelta) -> None:
    wait_until(lambda: not any(is_running(pid) for pid in pids), within=within, what=f"{pids} to end")


def _send(signal_number: signal.Signals, pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal_number)


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    # "pid (name) state parent ...", where the name may contain spaces and parentheses
    state, parent = status.rpartition(")")[2].split()[:2]
    return state, int(parent)
