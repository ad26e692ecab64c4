"""What happened in a trial, typed: the operation log, the service's own logs, and the tables at the end.

Pure data. Times are seconds of one monotonic clock; those of other logs and of the tables are converted.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

Key = tuple[str, int]  # message_id, retry_count


def attempt_of(retry_id: str) -> Key | None:
    """Return the attempt that an x-retry-id names; None for malformed input."""
    message_id, _, count = retry_id.rpartition(":")
    return (message_id, int(count)) if len(message_id) == 36 and count.isdigit() else None


@dataclass(frozen=True, slots=True)
class Enqueue:
    """A request to the retry queue. outcome: ok, fail, or info, as long as nothing else is known."""

    kind: str
    invoked_at: float
    body_sha256: str = ""
    message_id: str | None = None
    retry_count: int | None = None
    max_retries: int | None = None
    queue: str | None = None
    payload_sha256: str | None = None
    least_delay_ms: int | None = None
    outcome: str = "ok"

    @property
    def key(self) -> Key | None:
        """The attempt it asks for; None if it is malformed."""
        if self.message_id is None or self.retry_count is None:
            return None
        return self.message_id, self.retry_count


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message at a consumer. queue: where, or "review". retry_count: the header, or the review's field."""

    at: float
    retry_id: str
    queue: str
    sha256: str | None = None
    redelivered: bool = False
    message_id: str | None = None
    retry_count: int | None = None
    reason: str | None = None

    @property
    def key(self) -> Key | None:
        """The attempt that its x-retry-id names; None for malformed input."""
        return attempt_of(self.retry_id)


@dataclass(frozen=True)
class Fault:
    """From just before a fault until just after it was healed.

    target: as in `schedule`. instance: the only one that it hits; None if it hits all.
    """

    name: str
    target: str
    began: float
    healed: float
    instance: str | None = None

    def near(self, at: float, grace_s: float) -> bool:
        """Whether `at` is within it, or at most `grace_s` after it."""
        return self.began <= at <= self.healed + grace_s

    def hits(self, instance: str | None) -> bool:
        """Whether it hits that instance."""
        return self.instance in (None, instance)


@dataclass(frozen=True)
class InstanceEvent:
    """What was done to a process: start, kill, freeze, thaw, terminate, ended."""

    at: float
    what: str
    instance: str
    pid: int


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a service's log.

    retry_id: which attempt it is about, as in x-retry-id; None if about none. instance: whom it names.
    """

    at: float
    pid: int
    message: str
    retry_id: str | None = None
    review_reason: str | None = None
    instance: str | None = None
    late_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row of retry_queue at the end. claims: how often it was lent to an instance."""

    message_id: str
    retry_count: int
    max_retries: int
    status: str
    created_at: float
    finished_at: float | None = None
    note: str | None = None
    claims: int = 1

    @property
    def key(self) -> Key:
        """The attempt."""
        return self.message_id, self.retry_count

    @property
    def retry_id(self) -> str:
        """As in x-retry-id."""
        return f"{self.message_id}:{self.retry_count}"


@dataclass(frozen=True)
class Quarantined:
    """One row of retry_quarantine at the end."""

    id: int
    sha256: str
    delivered: bool

    @property
    def retry_id(self) -> str:
        """As in x-retry-id."""
        return f"quarantine:{self.id}"


@dataclass(frozen=True)
class Sample:
    """One look at a running process. when: warm, under way or end."""

    at: float
    when: str
    instance: str
    pid: int
    rss_kib: int = 0
    files: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """One trial. healed_at: the last fault was over. quiet_at: nothing was left to do; None: that never came.

    backoff_ms: base and cap of the service's delays. complaints: what no log of a service may hold.
    not_ready: instances that do not say that they work although everything else does.
    connections, connections_most: to the database at the end, and how many there may be.
    """

    enqueues: Sequence[Enqueue] = ()
    deliveries: Sequence[Arrival] = ()
    reviews: Sequence[Arrival] = ()
    faults: Sequence[Fault] = ()
    instance_events: Sequence[InstanceEvent] = ()
    events: Sequence[Event] = ()
    rows: Sequence[Row] = ()
    quarantined: Sequence[Quarantined] = ()
    samples: Sequence[Sample] = ()
    complaints: Sequence[str] = ()
    leaks: Sequence[str] = ()
    healed_at: float = 0.0
    quiet_at: float | None = 0.0
    left: str = ""
    not_ready: Sequence[str] = ()
    backoff_ms: tuple[int, int] = (200, 3000)
    connections: int = 0
    connections_most: int = 100

    @cached_property
    def rows_by_key(self) -> dict[Key, Row]:
        """The rows of retry_queue."""
        return {row.key: row for row in self.rows}

    @cached_property
    def requests_by_id(self) -> dict[str, list[Enqueue]]:
        """The well-formed requests that may be in the queue, by message."""
        found: dict[str, list[Enqueue]] = defaultdict(list)
        for enqueue in self.enqueues:
            if enqueue.message_id is not None and enqueue.outcome != "fail":
                found[enqueue.message_id].append(enqueue)
        return dict(found)

    @cached_property
    def deliveries_by_id(self) -> dict[str, list[Arrival]]:
        """Arrivals at original queues, by x-retry-id, in their order."""
        return _by_retry_id(self.deliveries)

    @cached_property
    def reviews_by_id(self) -> dict[str, list[Arrival]]:
        """Arrivals in manual review, by x-retry-id, in their order."""
        return _by_retry_id(self.reviews)

    @cached_property
    def instance_of(self) -> dict[int, str]:
        """Which instance each process was."""
        return {event.pid: event.instance for event in self.instance_events}

    @cached_property
    def delivered_at(self) -> list[float]:
        """When anything arrived at original queues, ascending."""
        return sorted(arrival.at for arrival in self.deliveries)

    @cached_property
    def malformed_and_reviewed(self) -> set[str]:
        """Digests of malformed bodies that were kept, and that manual review has got."""
        return {kept.sha256 for kept in self.quarantined if kept.retry_id in self.reviews_by_id}

    @cached_property
    def events_by_id(self) -> dict[str, list[Event]]:
        """Lines of the services' logs that are about an attempt, by x-retry-id, in their order."""
        found: dict[str, list[Event]] = defaultdict(list)
        for event in self.events:
            if event.retry_id is not None:
                found[event.retry_id].append(event)
        return dict(found)


def _by_retry_id(arrivals: Sequence[Arrival]) -> dict[str, list[Arrival]]:
    found: dict[str, list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        found[arrival.retry_id].append(arrival)
    return dict(found)
