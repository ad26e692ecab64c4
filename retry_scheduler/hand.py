"""What one instance has in hand: rows claimed and not settled. Says how many more may be claimed.

MAX_OUTSTANDING bounds what the death of an instance can turn into duplicates, and is the back-pressure:
a slow broker fills the hand, and claiming waits.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from retry_scheduler.messages import ClaimedRetry
from retry_scheduler.repository import ANY_BYTES
from retry_scheduler.suspicion import travels_alone
from retry_scheduler.transfer import LARGE_BYTES

# Rows claimed and not settled: the most duplicates that the death of one instance can cause.
MAX_OUTSTANDING = 512
# RabbitMQ lets a channel hand 400 messages to a queue that does not answer; with one more it reads
# nothing from that connection any more, and everybody waits for the queue that hangs.
MAX_IN_HAND = 384
# What is held up may fill the hand: so many more are for the others then.
MORE_IN_HAND = 64
# What travels alone takes its time, one after the other, and must not fill the hand meanwhile.
MAX_ALONE_IN_HAND = 16
MAX_QUARANTINED_IN_HAND = MAX_OUTSTANDING - MAX_IN_HAND - MORE_IN_HAND

# Half of what may be in hand, so that one batch is published while another is settled, and not less at a
# time, since small batches cost more.
CLAIM_ROWS = MAX_IN_HAND // 2
# In time over any link that carries 4 MiB/s.
CLAIM_BYTES = 16 * 1024 * 1024
# Each byte in hand is in memory about three times while it is on its way to a broker that is slow. Large
# payloads are counted apart, so that they do not keep the others waiting.
MAX_BYTES_IN_HAND = 2 * CLAIM_BYTES


class Hand:
    """Attempts only; quarantined messages have a bound of their own."""

    def __init__(self) -> None:
        self._claims: dict[int, int] = {}  # id -> claims
        self._bytes = {False: 0, True: 0}  # by whether the payload is large
        self._alone = 0

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

        Half a hand, or nothing if that is not free, or too many bytes are in it. What is slow or travels
        alone is left out of the account: the others share the rest of the hand, and a little more.
        """
        if self._bytes[False] > MAX_BYTES_IN_HAND:
            return 0
        held_up = slow + self._alone
        places = MAX_IN_HAND + (MORE_IN_HAND if held_up else 0)
        half = min(max((places - held_up) // 2, 0), CLAIM_ROWS)
        return half if places - len(self._claims) >= half else 0

    @property
    def room_alone(self) -> int:
        """How many more that travel alone may be kept."""
        return max(MAX_ALONE_IN_HAND - self._alone, 0)

    def room_for_probes(self) -> int:
        """Return how many rows may be claimed to try a connection: one, then as many again as there are."""
        if self._bytes[False] > MAX_BYTES_IN_HAND:
            return 0
        return max(min(max(len(self._claims), 1), MAX_IN_HAND - len(self._claims), CLAIM_ROWS), 0)

    def take(self, tasks: Sequence[ClaimedRetry]) -> None:
        """Note what has been claimed."""
        for task in tasks:
            self._claims[task.id] = task.claims
            self._bytes[is_large(task)] += task.payload_bytes
            self._alone += travels_alone(task.claims_unsettled)

    def put_down(self, task: ClaimedRetry) -> None:
        """Note that a row is settled or given back. Once for each claim."""
        # A row that was given back may have been claimed anew before its answer came.
        if self._claims.get(task.id) == task.claims:
            del self._claims[task.id]
        self._bytes[is_large(task)] -= task.payload_bytes
        self._alone -= travels_alone(task.claims_unsettled)


def is_large(task: ClaimedRetry) -> bool:
    """Whether its payload did not come along with the claim."""
    return task.payload_bytes > LARGE_BYTES


class Parts(NamedTuple):
    """A claim, parted. batches: what travels together; to_queue_up: what there is no room for."""

    batches: list[list[ClaimedRetry]]
    to_queue_up: list[ClaimedRetry]


def parted(tasks: Sequence[ClaimedRetry], room_alone: int) -> Parts:
    """Part a claim: each large payload by itself, and apart up to room_alone of what travels alone."""
    usual, alone, large = [], [], []
    for task in tasks:
        if travels_alone(task.claims_unsettled):
            alone.append(task)
        elif is_large(task):
            large.append([task])
        else:
            usual.append(task)
    batches = [batch for batch in (usual, alone[:room_alone], *large) if batch]
    return Parts(batches, alone[room_alone:])
