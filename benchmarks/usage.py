"""What programs cost: processor time and memory of whole process trees, from /proc.

A backend of PostgreSQL that has ended still counts: its time went to the process that waited for it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retry_scheduler.demo.processes import descendants

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Processor seconds used since each program's start. load_s: this process, upstream and consumer."""

    program_s: float
    rabbitmq_s: float
    postgres_s: float
    load_s: float

    @classmethod
    def now(cls, *, programs: Sequence[int], rabbitmq: int, postgres: int) -> "Usage":
        """Read all clocks. Parameters are process ids; their children are included."""
        mine = os.times()
        return cls(
            sum(tree_cpu_s(pid) for pid in programs),
            tree_cpu_s(rabbitmq),
            tree_cpu_s(postgres),
            mine.user + mine.system,
        )

    def per_retry_us(self, before: "Usage", count: int) -> dict[str, float]:
        """Return microseconds per retry for what was used since `before`, by who used it."""
        return {
            "program": (self.program_s - before.program_s) / count * 1e6,
            "rabbitmq": (self.rabbitmq_s - before.rabbitmq_s) / count * 1e6,
            "postgres": (self.postgres_s - before.postgres_s) / count * 1e6,
            "load": (self.load_s - before.load_s) / count * 1e6,
        }


def tree_cpu_s(pid: int) -> float:
    """Return the processor time of a process, of its children, and of those children that have ended."""
    # The parents last: a child that ends in between is then found in its parent's sum.
    return sum(_own_and_waited_for_s(member) for member in [*reversed(descendants(pid)), pid])


def resident_mb(pid: int) -> float:
    """Return the resident memory of one process now, in 10^6 bytes."""
    return _status_kib(pid, "VmRSS") * 1024 / 1e6


def peak_resident_mb(pid: int) -> float:
    """Return the most resident memory that the process has ever had, in 10^6 bytes."""
    return _status_kib(pid, "VmHWM") * 1024 / 1e6


def _own_and_waited_for_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # ended since it was listed
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS_PER_S  # utime, stime, cutime, cstime


def _status_kib(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise ValueError(f"/proc/{pid}/status has no {field}")
