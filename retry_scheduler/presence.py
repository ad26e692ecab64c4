"""Tells which instances have stopped, and whether this one may still trust its own leases.

Each instance raises a number in the register about once a second (its beat) and watches the
others' numbers. No clock is compared with another: an observer counts its own looks and its own
monotonic seconds. If PostgreSQL stalls, everybody's looks stall too, and nobody is buried.

    self:   beating -> fenced (no beat for FENCE_AFTER) -> beating again, under a new id if buried
    others: alive -> still (beat unmoved for STILL_AFTER and STILL_LOOKS looks) -> buried

Burying marks an instance as gone in the register, on condition that its beat has not moved: so the
register itself decides whether it is dead, and its next beat tells it. A lease of somebody who is
marked as gone is void. FENCE_AFTER is the shorter time: an instance that was frozen or cut off stops
publishing before its rows are taken over. What it had sent and not settled by then may be sent twice.
"""

from collections.abc import Mapping
from datetime import timedelta
from uuid import UUID, uuid4

BEAT_EVERY = timedelta(seconds=1)

# Shorter and a slow database would stop healthy instances; longer and rescue misses the SLA of 5 s.
FENCE_AFTER = timedelta(seconds=2)
STILL_AFTER = timedelta(seconds=2.5)
STILL_LOOKS = 3

# Only for an owner whom the register does not know: one that is in it keeps its rows however long it waits
# (an alarm of the broker may last a night), until its beat stands still.
LEASE = timedelta(minutes=10)


class Presence:
    """One instance's view. Times are seconds of any one monotonic clock."""

    def __init__(self) -> None:
        self.id: UUID = uuid4()
        self._last_beat_s: float | None = None
        self._others: dict[UUID, _Other] = {}

    def beaten(self, sent_at_s: float) -> None:
        """Note that a beat sent at that time has reached the register."""
        self._last_beat_s = sent_at_s

    def fenced(self, now_s: float) -> bool:
        """Whether this instance must not publish what it holds: others may have taken it."""
        return self._last_beat_s is None or now_s - self._last_beat_s > FENCE_AFTER.total_seconds()

    def trusts_leases_of(self, owner: UUID, now_s: float) -> bool:
        """Whether what was claimed as `owner` is ours still: not frozen, cut off or renamed since."""
        return owner == self.id and not self.fenced(now_s)

    def renew(self) -> None:
        """Take a new id, because the register does not know the old one."""
        self.id = uuid4()
        self._last_beat_s = None

    def observe(self, beats: Mapping[UUID, int], now_s: float) -> None:
        """Note the others' beats as one look saw them."""
        for gone in self._others.keys() - beats.keys():
            del self._others[gone]
        for id_, beat in beats.items():
            other = self._others.get(id_)
            if other is None or other.beat != beat:
                self._others[id_] = _Other(beat, now_s)
            else:
                other.looks += 1

    def still(self, now_s: float) -> dict[UUID, int]:
        """Return who should be buried, each with the beat at which it stands still."""
        after_s = STILL_AFTER.total_seconds()
        return {
            id_: other.beat
            for id_, other in self._others.items()
            if other.looks >= STILL_LOOKS and now_s - other.since_s >= after_s
        }


class _Other:
    """Another instance's beat: its number, since when it is known to stand, and looks that saw it unmoved."""

    def __init__(self, beat: int, since_s: float) -> None:
        self.beat = beat
        self.since_s = since_s
        self.looks = 0
