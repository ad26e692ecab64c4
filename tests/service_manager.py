"""A service manager as far as its services see it: a socket that keeps what it is told."""

import socket
import threading
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self


class FakeManager:
    """Listens on a socket of its own, in a thread: the kernel keeps only a few messages for a slow reader."""

    def __init__(self, address: Path, *, watchdog_s: float) -> None:
        """watchdog_s: how long it would wait for a WATCHDOG=1; nothing happens if none comes."""
        self._address = address
        self._watchdog_s = watchdog_s
        self._pings_s: list[float] = []
        self._began_s = 0.0
        self.told: list[str] = []  # every line so far, but for the pings
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fake service manager")

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._address))
        self._socket.settimeout(0.1)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._socket.close()

    @property
    def environment(self) -> Mapping[str, str]:
        """What it adds to the environment of its services."""
        return {
            "NOTIFY_SOCKET": str(self._address),
            "WATCHDOG_USEC": str(round(self._watchdog_s * 1e6)),
        }

    @property
    def status(self) -> str:
        """The last status."""
        return next((line[7:] for line in reversed(self.told) if line.startswith("STATUS=")), "")

    @property
    def pings(self) -> int:
        """How many pings have come since `count_anew`."""
        return len(self._counted())

    @property
    def longest_silence_s(self) -> float:
        """The longest time without a ping, from `count_anew` until now."""
        moments_s = [self._began_s, *self._counted(), time.monotonic()]
        return max(after - before for before, after in pairwise(moments_s))

    @property
    def silence_s(self) -> float:
        """How long no ping has come now."""
        return time.monotonic() - [self._began_s, *self._counted()][-1]

    def count_anew(self) -> None:
        """Forget the pings that have come."""
        self._began_s = time.monotonic()

    def _counted(self) -> list[float]:
        return [at_s for at_s in self._pings_s if at_s > self._began_s]

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                message = self._socket.recv(4096).decode()
            except TimeoutError:
                continue
            if message == "WATCHDOG=1":
                self._pings_s.append(time.monotonic())
            else:
                self.told += message.splitlines()
