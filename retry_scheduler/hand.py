"""What one instance has in hand: rows claimed and not settled. Says how many more may be claimed.

MAX_OUTSTANDING bounds what the death of an instance can turn into duplicates, and is the back-pressure:
a slow broker fills the hand, and claiming waits.
"""

from collections.abc import Collection, Sequence

from retry_scheduler.messages import ClaimedRetry
from retry_scheduler.publisher import travels_alone
from retry_scheduler.repository import ANY_BYTES, LARGE_BYTES

# Rows claimed and not settled: the most duplicates that the death of one instance can cause.
MAX_OUTSTANDING = 512
# RabbitMQ lets a channel hand 400 messages to a queue that does not answer; with one more it reads
# nothing from that connection any more, and everybody waits for the queue that hangs.
MAX_IN_HAND = 384
# What waits for slow queues may fill the hand: so many more are for the other queues then.
MORE_IN_HAND = 64
MAX_QUARANTINED_IN_HAND = MAX_OUTSTANDING - MAX_IN_HAND - MORE_IN_HAND

# Half of what may be in hand, so that one batch is published while another is settled.
CLAIM_ROWS = MAX_IN_HAND // 2
CLAIM_BYTES = 16 * 1024 * 1024
# Each byte in hand is in memory about three times while it is on its way to a broker that is slow. Large
# payloads are counted apart, so that they do not keep the others waiting.
MAX_HELD_BYTES = 2 * CLAIM_BYTES


class Hand:
    """Attempts only; quarantined messages have a bound of their own."""

    def __init__(self) -> None:
        self._claims: dict[int, int] = {}  # id -> claims
        self._bytes = {False: 0, True: 0}  # by whether the payload is large

    def __len__(self) -> int:
        return len(self._claims)

    @property
    def ids(self) -> Collection[int]:
        """The ids of the rows in hand, as they change."""
        return self._claims.keys()

    @property
    def limit_payload_bytes(self) -> int:
        """How large a payload may be to be claimed now: while enough large ones are in hand, none is."""
        return LARGE_BYTES if self._bytes[True] > CLAIM_BYTES else ANY_BYTES

    def room(self, *, slow: int) -> int:
        """Return how many rows may be claimed now. slow: how many in hand wait for slow queues.

        None if less than half a hand is free, in rows or in bytes, since small batches cost more. A few
        more if slow queues fill the hand; whoever publishes holds what else is for those.
        """
        if self._bytes[False] > MAX_HELD_BYTES:
            return 0
        room = MAX_IN_HAND - len(self._claims)
        if room >= CLAIM_ROWS:
            return CLAIM_ROWS
        return max(room + MORE_IN_HAND, 0) if slow >= MAX_IN_HAND - CLAIM_ROWS else 0

    def room_for_probes(self) -> int:
        """Return how many rows may be claimed to try a connection: one, then as many again as there are."""
        if self._bytes[False] > MAX_HELD_BYTES:
            return 0
        return min(max(len(self._claims), 1), MAX_IN_HAND - len(self._claims), CLAIM_ROWS)

    def take(self, tasks: Sequence[ClaimedRetry]) -> None:
        """Note what has been claimed."""
        for task in tasks:
            self._claims[task.id] = task.claims
            self._bytes[is_large(task)] += task.payload_bytes

    def put_down(self, task: ClaimedRetry) -> None:
        """Note that a row is settled or given back. Once for each claim."""
        # A row that was given back may have been claimed anew before its answer came.
        if self._claims.get(task.id) == task.claims:
            del self._claims[task.id]
        self._bytes[is_large(task)] -= task.payload_bytes


def is_large(task: ClaimedRetry) -> bool:
    """Whether its payload did not come along with the claim."""
    return task.payload_bytes > LARGE_BYTES


def batches(tasks: Sequence[ClaimedRetry]) -> list[list[ClaimedRetry]]:
    """Part a claim into what travels together: each large payload alone, and what is suspected apart."""
    usual, lonely, large = [], [], []
    for task in tasks:
        if is_large(task):
            large.append([task])
        elif travels_alone(task.claims_unsettled):
            lonely.append(task)
        else:
            usual.append(task)
    return [batch for batch in (usual, lonely, *large) if batch]
