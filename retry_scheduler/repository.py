"""What the service asks of PostgreSQL, in its own words: store, claim, settle, give back, look.

The statements are in sql/. A claim is a lease with a fence: `claims` rises with every
claim, and settling names it, so that an instance that was overtaken changes nothing. No method
keeps state. Before `store` is repeated after Unavailable, `stored_intakes` tells what it had stored.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from uuid import UUID

import msgspec

from retry_scheduler.database import Database
from retry_scheduler.errors import Unavailable
from retry_scheduler.messages import ClaimedQuarantine, ClaimedRetry, RetryRequest
from retry_scheduler.transfer import LARGE_BYTES

Attempt = tuple[str, int]

ANY_BYTES = 2**31 - 1

LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


class Stored(msgspec.Struct):
    """An attempt newly stored. due_in_s: seconds from the answer, by the database's clock."""

    next_retry_at: datetime
    due_in_s: float


class AttemptState(msgspec.Struct):
    """How a stored attempt stands. highest: the highest retry_count stored for its message.

    age_s: since it was stored, by the database's clock. redelivered: whether the broker had delivered before
    the message that it came from. may_have_arrived: although pending, it may be with its consumer already,
    and may never be sent again.
    """

    status: str
    highest: int
    age_s: float
    redelivered: bool
    may_have_arrived: bool


class Malformed(msgspec.Struct):
    """Input to be kept as it came, and why it cannot become an attempt."""

    field: str
    reason: str
    raw_body: bytes
    raw_properties: bytes
    redelivered: bool
    intake_id: int


class Lease(msgspec.Struct, frozen=True):
    """On what terms rows are claimed.

    owner: the claiming instance. lasts: until others may take the row if the register does not know the
    owner. limit_rows, limit_bytes: at least one row comes whatever its size, then as many as fit.
    floor: nothing that is pending is due before it. in_hand: ids that the owner knows to hold.
    limit_payload_bytes: rows with a larger payload are passed over.
    """

    owner: UUID
    lasts: timedelta
    limit_rows: int
    limit_bytes: int
    floor: datetime = LONG_AGO
    in_hand: Collection[int] = ()
    limit_payload_bytes: int = ANY_BYTES


class Settlement(msgspec.Struct):
    """A claimed row whose publication was confirmed. status: "retried" or "failed"."""

    id: int
    claims: int
    status: str
    note: str | None = None


class Release(msgspec.Struct):
    """A claimed row that goes back.

    failures: to be added. delay: None keeps the due time, as for a row that was never sent.
    unsettled: claims in a row without an outcome; 0 unless the row is suspected.
    """

    id: int
    claims: int
    failures: int = 0
    error: str | None = None
    delay: timedelta | None = None
    unsettled: int = 0


class Suspicion(msgspec.Struct):
    """Evidence against a claimed row. unsettled: claims in a row without an outcome."""

    id: int
    claims: int
    unsettled: int


class Sighting(msgspec.Struct):
    """What `beat` saw. beats: of the other instances. coming_s: due times, seconds from now, ascending."""

    beats: dict[UUID, int]
    due_now: bool
    quarantined: bool
    coming_s: list[float]


class DueFigures(msgspec.Struct):
    """What waits. due: would be sent at once. Neither is counted further than counted_up_to.

    oldest_due_at: ISO 8601, UTC; None if nothing is due.
    """

    pending: int
    due: int
    oldest_due_at: str | None
    counted_up_to: int


class Repository:
    """Every method raises Unavailable if PostgreSQL cannot answer, DataRefused if it refuses a value."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def store(
        self, requests: Sequence[RetryRequest], delays: Sequence[timedelta]
    ) -> dict[Attempt, Stored]:
        """Store attempts in one statement and return those that were not stored before.

        requests: each attempt once. delays: for each, how long until it is due.
        """
        rows = await self._database.fetch(
            "store_requests",
            [request.message_id for request in requests],
            [request.retry_count for request in requests],
            [request.max_retries for request in requests],
            [request.original_queue for request in requests],
            [request.error_reason for request in requests],
            delays,
            [request.payload for request in requests],
            [request.traceparent for request in requests],
            [request.tracestate for request in requests],
            [request.intake_id for request in requests],
            moved_bytes=sum(len(request.payload) for request in requests),
        )
        return {
            (str(message_id), retry_count): Stored(next_retry_at, due_in)
            for message_id, retry_count, next_retry_at, due_in in rows
        }

    async def stored_intakes(self, requests: Sequence[RetryRequest]) -> dict[int, tuple[Attempt, Stored]]:
        """Return, by intake_id, what has been stored of `requests` although its answer was lost."""
        rows = await self._database.fetch(
            "stored_intakes",
            [request.message_id for request in requests],
            [request.intake_id for request in requests],
        )
        names = {request.intake_id: request.message_id for request in requests}
        return {
            intake_id: ((names[intake_id], retry_count), Stored(next_retry_at, due_in))
            for intake_id, retry_count, next_retry_at, due_in in rows
        }

    async def attempt_states(self, attempts: Sequence[Attempt]) -> dict[Attempt, AttemptState]:
        """Return how those of `attempts` stand that are stored."""
        rows = await self._database.fetch(
            "attempt_states", [attempt[0] for attempt in attempts], [attempt[1] for attempt in attempts]
        )
        return {
            (str(row["message_id"]), row["retry_count"]): AttemptState(
                row["status"], row["highest"], row["age_s"], row["redelivered"], row["may_have_arrived"]
            )
            for row in rows
        }

    async def quarantine(self, malformed: Sequence[Malformed]) -> set[int]:
        """Keep malformed input, and return the intake_id of each that was not kept before."""
        rows = await self._database.fetch(
            "store_quarantined",
            [sha256(item.raw_body).digest() for item in malformed],
            [item.field for item in malformed],
            [item.reason for item in malformed],
            [item.raw_body for item in malformed],
            [item.raw_properties for item in malformed],
            [item.redelivered for item in malformed],
            [item.intake_id for item in malformed],
            moved_bytes=sum(len(item.raw_body) for item in malformed),
        )
        return {row[0] for row in rows}

    async def claim_due(self, lease: Lease) -> list[ClaimedRetry]:
        """Borrow due attempts, the oldest ones, in no promised order; perhaps none.

        Payloads above LARGE_BYTES are left to `payload`: one that takes long to arrive must
        not keep the others from being claimed.
        """
        rows = await self._database.fetch(
            "claim_due",
            *_claim_arguments(lease),
            lease.floor,
            list(lease.in_hand),
            LARGE_BYTES,
            lease.limit_payload_bytes,
        )
        return [ClaimedRetry(row[0], row[1], str(row[2]), *row[3:]) for row in map(tuple, rows)]

    async def payload(self, task: ClaimedRetry) -> bytes | None:
        """Return the payload that was too large to come with the claim; None if it has been deleted."""
        rows = await self._database.fetch("payload", task.id, moved_bytes=task.payload_bytes)
        return rows[0]["payload"] if rows else None

    async def complete(self, settlements: Sequence[Settlement]) -> set[int]:
        """Settle rows for good, and return the ids of those that were still ours."""
        rows = await self._database.fetch(
            "complete",
            [done.id for done in settlements],
            [done.claims for done in settlements],
            [done.status for done in settlements],
            [done.note for done in settlements],
        )
        return {row[0] for row in rows}

    async def release(self, releases: Sequence[Release]) -> list[float]:
        """Give rows back, and return in how many seconds each is due. Those no longer ours are left alone."""
        return [row["due_in"] for row in await self._database.fetch("release", *_release_arguments(releases))]

    async def suspect(self, suspicions: Sequence[Suspicion]) -> None:
        """Put evidence against rows in the table. Those no longer ours are left alone."""
        await self._database.fetch("suspect", *_suspect_arguments(suspicions))

    async def claim_quarantined(self, lease: Lease) -> list[ClaimedQuarantine]:
        """Borrow quarantined messages that manual review has not got yet; perhaps none."""
        rows = await self._database.fetch("claim_quarantined", *_claim_arguments(lease))
        return [
            ClaimedQuarantine(
                row["id"],
                row["claims"],
                row["field"],
                row["reason"],
                row["raw_body"],
                row["received_at"].astimezone(UTC).isoformat(),
                row["publish_failures"],
                row["claims_unsettled"],
            )
            for row in rows
        ]

    async def complete_quarantined(self, settlements: Sequence[Settlement]) -> set[int]:
        """Note that manual review has got them, and return the ids of those that were still ours."""
        rows = await self._database.fetch(
            "complete_quarantined", [done.id for done in settlements], [done.claims for done in settlements]
        )
        return {row[0] for row in rows}

    async def release_quarantined(self, releases: Sequence[Release]) -> None:
        """Give quarantined messages back."""
        await self._database.fetch("release_quarantined", *_release_arguments(releases))

    async def suspect_quarantined(self, suspicions: Sequence[Suspicion]) -> None:
        """Put evidence against quarantined messages in the table. Otherwise as `suspect`."""
        await self._database.fetch("suspect_quarantined", *_suspect_arguments(suspicions))

    async def join_instances(self, owner: UUID, name: str) -> None:
        """Enter an instance in the register."""
        await self._database.fetch("join_instances", owner, name)

    async def leave_instances(self, owner: UUID) -> None:
        """Mark an instance as gone: it holds nothing any more."""
        await self._database.fetch("leave_instances", owner)

    async def bury_instances(self, beats: Mapping[UUID, int]) -> list[str]:
        """Mark as gone those whose beat is still the one given; return their names. It voids their leases."""
        rows = await self._database.fetch("bury_instances", list(beats), list(beats.values()))
        return [row["name"] for row in rows]

    async def beat(
        self, owner: UUID, look_ahead: timedelta, floor: datetime, in_hand: Collection[int] = ()
    ) -> Sighting | None:
        """Show that `owner` is alive and look at the table. None: not registered, or marked as gone.

        floor: nothing that is pending is due before it. in_hand: ids that `owner` knows to hold.
        """
        rows = await self._database.fetch("beat", owner, look_ahead, floor, list(in_hand))
        if not rows:
            return None
        row = rows[0]
        beats = {UUID(bytes=id_.bytes): beat for id_, beat in zip(row["ids"], row["beats"], strict=True)}
        return Sighting(beats, row["due_now"], row["quarantined"], row["coming"])

    async def search_floor(self, begin: datetime) -> datetime:
        """Return a due time below which nothing is pending, nor will be unless an operator says so.

        begin: where to search from; what is due before it is not seen.
        """
        floor: datetime = (await self._database.fetch("search_floor", begin))[0]["floor"]
        return floor

    async def queue_figures(self) -> tuple[int, float]:
        """Return how many attempts are pending and for how many seconds the oldest due one has been."""
        rows = await self._database.fetch("queue_figures")
        if not rows:
            raise Unavailable("PostgreSQL", "no answer to a count")
        return rows[0]["depth"], rows[0]["oldest_due_s"]

    async def due_figures(self, count_up_to: int) -> DueFigures:
        """Count what waits and what is due, neither further than `count_up_to`."""
        (row,) = await self._database.fetch("due_figures", count_up_to)
        oldest = row["oldest_due_at"]
        return DueFigures(
            row["pending"], row["due"], oldest.astimezone(UTC).isoformat() if oldest else None, count_up_to
        )


def _claim_arguments(lease: Lease) -> tuple[object, ...]:
    return lease.limit_rows, lease.lasts, lease.owner, lease.limit_bytes


def _suspect_arguments(suspicions: Sequence[Suspicion]) -> tuple[list[int], ...]:
    return (
        [suspicion.id for suspicion in suspicions],
        [suspicion.claims for suspicion in suspicions],
        [suspicion.unsettled for suspicion in suspicions],
    )


def _release_arguments(releases: Sequence[Release]) -> tuple[list[object], ...]:
    return (
        [release.id for release in releases],
        [release.claims for release in releases],
        [release.failures for release in releases],
        [release.error for release in releases],
        [release.delay for release in releases],
        [release.unsettled for release in releases],
    )
