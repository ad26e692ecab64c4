"""Looks at the running instances now and then: memory, open files, database connections, metrics."""

import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from chaos.bed import ROLE, Place
from chaos.instance import Instance
from chaos.oplog import OperationLog
from retry_scheduler.demo.processes import PrivateServerError

EVERY_S = 3.0

_SAMPLE = re.compile(r"^(retr[a-z_]+)(?:\{(.*)\})? ([0-9.e+-]+)$", re.MULTILINE)
_LABEL = re.compile(r'(?:^|,)(status|reason|kind|server)="([^"]*)"')


class Monitor:
    """A thread that writes a sample of each instance into the operation log."""

    def __init__(self, place: Place, instances: Sequence[Instance], log: OperationLog) -> None:
        self._place = place
        self._instances = instances
        self._log = log
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="monitor", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join(timeout=30)

    def look(self, when: str) -> None:
        """Write one sample of each instance that answers. when: warm, under way or end."""
        for instance in self._instances:
            if not instance.is_running or instance.frozen:
                continue
            pid = instance.pid
            page = instance.page("/metrics")
            if page is None:
                continue
            with suppress(OSError):  # it has just been killed
                self._log.write(
                    "sample",
                    "ok",
                    when=when,
                    instance=instance.name,
                    pid=pid,
                    rss_kib=_resident_kib(pid),
                    files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
                    metrics=sums(page),
                )

    def connections(self) -> int:
        """Return how many connections the instances have to the database. Raises PrivateServerError."""
        return int(self._place.sql(f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{ROLE}'"))

    def _work(self) -> None:
        while not self._stop.wait(EVERY_S):
            with suppress(PrivateServerError):
                self.look("under way")


def sums(page: str) -> dict[str, float]:
    """Return the counters of a metrics page, summed over queues: name, or name{status or reason or kind}."""
    found: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(page):
        if name.endswith("_total"):
            told = _LABEL.search(labels)
            key = f"{name}{{{told[2]}}}" if told else name
            found[key] = found.get(key, 0) + float(value)
    return found


def _resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0
