"""Tells the service manager (systemd) how the service is, and that it moves (the sd_notify protocol).

    READY=1      the settings are good and the pages answer; its servers may still be away
    STATUS=...   one line for `systemctl status`, whenever it changes
    WATCHDOG=1   every critical loop moves; if this does not come, the manager kills us and starts anew
    STOPPING=1   the stop has begun

An outage must not look like standing still: a restart would not end it. So a loop moves as long as it
tries, however often it fails, and one that waits takes a step now and then. What stands still is a
loop that has ended, or that waits for something without a deadline. A blocked event loop sends nothing.

Nothing is sent unless the manager has named its socket.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Self

import structlog

from retry_scheduler.observability import events

log = structlog.get_logger()

# However little there is to do.
STEP_AT_LEAST_EVERY_S = 5.0

# The longest step is two statements that a slow PostgreSQL answers at their deadlines, 8 s each. Shorter
# would restart a service that only waits; longer would leave one alone that never moves again.
STANDS_AFTER_S = 20.0

# The status is for people.
LOOK_EVERY_S = 1.0

# systemd asks for two in its interval; a third allows for one that comes late.
PINGS_PER_INTERVAL = 3


class Progress:
    """When each critical loop last moved."""

    def __init__(self) -> None:
        self._moved_at_s: dict[str, float] = {}

    def moved(self, loop: str, next_takes_s: float = 0.0) -> None:
        """Note that a loop has taken a step. It is watched from its first one on.

        next_takes_s: so much longer than others its next step may take, since it moves many bytes.
        """
        self._moved_at_s[loop] = time.monotonic() + next_takes_s

    def standing(self) -> list[str]:
        """Return the loops that have not moved for STANDS_AFTER_S, in alphabetical order."""
        latest_s = time.monotonic() - STANDS_AFTER_S
        return sorted(loop for loop, moved_at_s in self._moved_at_s.items() if moved_at_s < latest_s)


class ServiceManager:
    """The socket of whoever started us; without an address, nobody's. Its troubles never become ours."""

    def __init__(self, address: str | None = None, *, watchdog_s: float | None = None) -> None:
        """address: a path, or a name that begins with @. watchdog_s: how long it waits for a WATCHDOG=1."""
        self._address = address
        self.watchdog_s = watchdog_s

    @classmethod
    def named_by(cls, environment: Mapping[str, str]) -> Self:
        """Return the manager that NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID name."""
        interval_us = environment.get("WATCHDOG_USEC", "")
        meant_for_us = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watched = meant_for_us and interval_us.isdecimal() and int(interval_us) > 0
        return cls(environment.get("NOTIFY_SOCKET"), watchdog_s=int(interval_us) / 1e6 if watched else None)

    def tell(self, *assignments: str) -> None:
        """Send a message of one or more lines. Never waits and never raises."""
        if not self._address:
            return
        # Linux's names without a file begin with a NUL, which an environment cannot hold.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(assignments).encode(), address)
        except OSError as error:
            log.warning(events.MANAGER_DEAF, told=assignments, error=error.strerror)


class Supervisor:
    """The loop that talks to the service manager."""

    def __init__(self, manager: ServiceManager, progress: Progress, status: Callable[[], str]) -> None:
        """status: how the service is, in one line."""
        self._manager = manager
        self._progress = progress
        self._status = status
        self._told_status = ""
        self._standing: list[str] = []
        self._ping_every_s = (manager.watchdog_s or float("inf")) / PINGS_PER_INTERVAL
        self._look_every_s = min(LOOK_EVERY_S, self._ping_every_s)
        self._pinged_at_s = float("-inf")

    async def run(self, stop: asyncio.Event) -> None:
        """Say that the service is ready, then how it is until `stop` is set, then that it is stopping."""
        self._manager.tell("READY=1")
        while not stop.is_set():
            self.run_once()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._look_every_s):
                    await stop.wait()
        self._manager.tell("STOPPING=1", "STATUS=stopping")

    def run_once(self) -> None:
        """Send what is new, and the ping if it is due and every loop moves."""
        status = self._status()
        if status != self._told_status:
            self._told_status = status
            self._manager.tell(f"STATUS={status}")
        standing = self._progress.standing()
        if standing and standing != self._standing:
            log.critical(events.LOOP_STANDS, loops=standing)
        self._standing = standing
        if not standing and self._manager.watchdog_s is not None:
            self._ping_if_due()

    def _ping_if_due(self) -> None:
        now_s = time.monotonic()
        # Half a look early rather than half a look late: timers are not exact.
        if now_s - self._pinged_at_s >= self._ping_every_s - self._look_every_s / 2:
            self._pinged_at_s = now_s
            self._manager.tell("WATCHDOG=1")
