"""Turns messages on the retry queue into stored attempts: what has arrived, in one statement, one ack.

    received -> checked -> stored (commit) -> acknowledged
                       `-> quarantined (commit) -> acknowledged

A crash before the commit, or between commit and acknowledgement, makes the broker deliver again
with the redelivered flag; an attempt that is stored already is then left as it is.

What a repeated attempt means (contract, section 2):

    redelivered by the broker                          nothing changes
    a new message, and the attempt is still pending    nothing changes
    the same, but our connection has ended, and it     nothing changes: it came from this very message,
    was stored after we received the message, or       which the broker has given to another instance
    from a redelivered one while ours was on its way
    a new message, and the attempt has been executed   the upstream does not count: it becomes the
                                                       next attempt, highest retry_count + 1

Of several in one batch each becomes one more: their numbers are given at once, and stored in one statement.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import structlog

from retry_scheduler import failpoints
from retry_scheduler.agenda import Agenda
from retry_scheduler.backoff import BackoffPolicy, delay_asked_for, delay_before_retry
from retry_scheduler.broker.connection import HEARTBEAT_S, Connection
from retry_scheduler.broker.intake_link import Delivery, IntakeLink
from retry_scheduler.broker.properties import text_headers
from retry_scheduler.errors import DataRefused, MalformedRequest, Unavailable
from retry_scheduler.messages import RetryRequest, parse_request, storable_text
from retry_scheduler.observability import events, logs
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.outage import OutageBackoff
from retry_scheduler.repository import Attempt, Malformed, Repository, Stored
from retry_scheduler.supervision import STEP_AT_LEAST_EVERY_S, Progress

if TYPE_CHECKING:  # loading it would load OpenTelemetry
    from retry_scheduler.observability.tracing import Tracing

log = structlog.get_logger()

# W3C trace context allows 512 characters of tracestate at least; longer ones may be dropped.
TRACE_HEADERS = ("traceparent", "tracestate")
TRACE_HEADER_MAX_CHARACTERS = 1024

RETRY_COUNT_MAX = 2**31 - 1

# So long a message may have been on its way to us; on a link that holds it longer the heartbeats fail.
LONGEST_WAY_S = 3 * HEARTBEAT_S
REASON_MAX_BYTES = 1024

LOOP = "intake"


class Consumer:
    """Stores whatever the intake link receives."""

    def __init__(
        self,
        intake: IntakeLink,
        repository: Repository,
        agenda: Agenda,
        metrics: Metrics,
        *,
        policy: BackoffPolicy,
        own_queues: Collection[str],
        default_max_retries: int,
        progress: Progress,
        on_malformed: Callable[[], None],
        tracing: "Tracing | None" = None,
    ) -> None:
        """on_malformed: called when something was quarantined and waits for manual review."""
        self._intake = intake
        self._repository = repository
        self._agenda = agenda
        self._metrics = metrics
        self._policy = policy
        self._own_queues = frozenset(own_queues)
        self._default_max_retries = default_max_retries
        self._progress = progress
        self._on_malformed = on_malformed
        self._tracing = tracing
        self._outage = OutageBackoff()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then ask for no more and store what had been sent to us before."""
        stopping = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                taking = asyncio.ensure_future(self._intake.take())
                while not taking.done() and not stopping.done():
                    self._progress.moved(LOOP)
                    await asyncio.wait(
                        (taking, stopping),
                        timeout=STEP_AT_LEAST_EVERY_S,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                if not taking.done():
                    taking.cancel()
                    await asyncio.gather(taking, return_exceptions=True)
                    break
                await self._persist(taking.result())
        finally:
            stopping.cancel()
        await self._intake.stop_consuming()
        while batch := self._intake.take_arrived():
            await self._persist(batch)

    async def run_once(self, batch: Sequence[Delivery], *, again: bool = False) -> None:
        """Store one batch and acknowledge it. Raises Unavailable; then nothing was acknowledged.

        again: it was tried before, and part of it may be stored although the answer was lost.
        """
        began_ns = time.time_ns()
        candidates: list[_Candidate] = []
        malformed: list[Malformed] = []
        for delivery in batch:
            if delivery.done:  # by a try that failed later on
                continue
            try:
                candidates.append(_Candidate(self._read(delivery), delivery))
            except MalformedRequest as problem:
                malformed.append(_malformed(delivery, problem))
            except Exception:  # a bug of ours in reading must not stop the other messages
                log.exception(events.UNREADABLE, body_bytes=len(delivery.body))
                malformed.append(
                    _malformed(delivery, MalformedRequest("body", "cannot be read (see the log)"))
                )
        if again:
            candidates = await self._not_stored_yet(candidates)
        failpoints.reach("before_store")
        malformed += await self._store(candidates, again=again)
        if malformed:
            failpoints.reach("before_quarantine")
            await self._quarantine(malformed)
        failpoints.reach("before_ack")
        self._intake.acknowledge(batch)
        if self._tracing is not None:
            self._tracing.stored(
                (c.request.traceparent for c in candidates if c.request.traceparent),
                messages=len(batch),
                quarantined=len(malformed),
                began_ns=began_ns,
            )

    async def _persist(self, batch: Sequence[Delivery]) -> None:
        """Store one batch, however long PostgreSQL is away: it is in the broker's hands until then."""
        again = False
        while True:
            self._progress.moved(LOOP)
            try:
                return await self.run_once(batch, again=again)
            except Unavailable as problem:
                log.error(events.SAVE_FAILED, messages=len(batch), error=str(problem))
            again = True
            await self._outage.wait()

    def _read(self, delivery: Delivery) -> RetryRequest:
        request = parse_request(
            delivery.body, own_queues=self._own_queues, default_max_retries=self._default_max_retries
        )
        request.intake_id = delivery.intake_id
        if b"trace" in delivery.properties:
            trace = text_headers(delivery.properties, TRACE_HEADERS)
            request.traceparent = _short(trace.get("traceparent"))
            request.tracestate = _short(trace.get("tracestate"))
        return request

    def _delay(self, request: RetryRequest) -> timedelta:
        if request.retry_count >= request.max_retries:
            return timedelta(0)  # exhausted: waiting helps nobody
        if request.retry_after_ms is not None:
            return delay_asked_for(request.retry_after_ms)
        return delay_before_retry(request.retry_count, self._policy, random.random())

    async def _not_stored_yet(self, candidates: Sequence["_Candidate"]) -> list["_Candidate"]:
        """Report what an earlier try has stored although its answer was lost, and return the rest."""
        stored = await self._repository.stored_intakes([candidate.request for candidate in candidates])
        rest: list[_Candidate] = []
        for candidate in candidates:
            if candidate.delivery.intake_id in stored:
                attempt, entry = stored[candidate.delivery.intake_id]
                candidate.request.retry_count = attempt[1]
                self._report({attempt: candidate}, {attempt: entry})
            else:
                rest.append(candidate)
        return rest

    async def _store(self, candidates: Sequence["_Candidate"], *, again: bool) -> list[Malformed]:
        """Store all, repeated attempts by the rules above. Return those that cannot be stored.

        again: an earlier try may still be under way on a slow link, and come through before this one.
        """
        refused: list[Malformed] = []
        waiting = list(candidates)
        while waiting:
            # Each attempt once in a statement; what became of it decides about its repetitions.
            first: dict[Attempt, _Candidate] = {}
            for candidate in waiting:
                first.setdefault(candidate.request.attempt, candidate)
            stored, unstorable = await self._insert(list(first.values()))
            self._report(first, stored)
            refused += [_malformed(candidate.delivery, problem) for candidate, problem in unstorable.items()]
            rest = [c for c in waiting if not c.delivery.done and c not in unstorable]
            # Of an attempt whose first request cannot be stored, the next one is tried.
            untried = [c for c in rest if first[c.request.attempt] in unstorable]
            repeated = [c for c in rest if first[c.request.attempt] not in unstorable]
            if again and repeated:
                repeated = await self._not_stored_yet(repeated)
            onward, at_the_end = await self._next_attempts(repeated)
            refused += at_the_end
            waiting = untried + onward
        return refused

    async def _insert(
        self, candidates: Sequence["_Candidate"]
    ) -> tuple[dict[Attempt, Stored], dict["_Candidate", MalformedRequest]]:
        """Store attempts, and find by halving the ones that PostgreSQL refuses."""
        self._progress.moved(LOOP)
        requests = [candidate.request for candidate in candidates]
        try:
            return await self._repository.store(requests, [self._delay(request) for request in requests]), {}
        except DataRefused as problem:
            if len(candidates) == 1:
                return {}, {candidates[0]: MalformedRequest("body", str(problem))}
        middle = len(candidates) // 2
        stored, refused = await self._insert(candidates[:middle])
        more_stored, more_refused = await self._insert(candidates[middle:])
        return stored | more_stored, refused | more_refused

    async def _next_attempts(
        self, repeated: Sequence["_Candidate"]
    ) -> tuple[list["_Candidate"], list[Malformed]]:
        """Return what must be stored as a next attempt, and what has no next; the rest is only counted."""
        if not repeated:
            return [], []
        states = await self._repository.attempt_states(list({candidate.told for candidate in repeated}))
        answered_s = time.monotonic()

        def perhaps_from_it(candidate: _Candidate) -> bool:
            state = states.get(candidate.told)
            if state is None:
                return False
            way_s = LONGEST_WAY_S if state.redelivered else 0.0
            return answered_s - state.age_s > candidate.delivery.received_s - way_s

        # While a connection answers, nobody else was given what it has delivered: that is another message.
        ended = await _ended({c.delivery.connection for c in repeated if perhaps_from_it(c)})
        highest: dict[str, int] = {}  # by message, the given numbers included: each repetition has its own
        onward: list[_Candidate] = []
        at_the_end: list[Malformed] = []
        for candidate in repeated:
            message_id, told = candidate.told
            state = states.get(candidate.told)
            if state is None:  # archived or deleted a moment ago: then it is new after all
                candidate.request.retry_count = told
                onward.append(candidate)
            elif (
                candidate.delivery.redelivered
                or state.status == "pending"
                or (candidate.delivery.connection in ended and perhaps_from_it(candidate))
            ):
                candidate.delivery.done = True
                self._metrics.duplicate("ignored")
                log.info(
                    events.DUPLICATE_IGNORED,
                    **_fields(candidate.request),
                    status=state.status,
                    redelivered=candidate.delivery.redelivered,
                )
            elif (number := highest.get(message_id, state.highest) + 1) > RETRY_COUNT_MAX:
                problem = MalformedRequest("retry_count", "repeats the highest attempt that can be counted")
                at_the_end.append(_malformed(candidate.delivery, problem))
            else:
                # Another instance may take the same number first: then this is asked again from the start.
                highest[message_id] = candidate.request.retry_count = number
                onward.append(candidate)
        return onward, at_the_end

    def _report(self, first: dict[Attempt, "_Candidate"], stored: dict[Attempt, Stored]) -> None:
        for attempt in stored:
            first[attempt].delivery.done = True
            if first[attempt].told != attempt:
                self._metrics.duplicate("stored_as_next")
        queues = Counter(first[attempt].request.original_queue for attempt in stored)
        for queue, count in queues.items():
            self._metrics.scheduled(queue, count)
        logs.info_lines(
            events.RETRY_SCHEDULED,
            (
                _fields(first[attempt].request) | {"next_retry_at": entry.next_retry_at.isoformat()}
                for attempt, entry in stored.items()
            ),
        )
        self._agenda.expect(entry.due_in_s for entry in stored.values())

    async def _quarantine(self, malformed: Sequence[Malformed]) -> None:
        self._progress.moved(LOOP)
        kept = await self._repository.quarantine(malformed)
        for item in malformed:
            if item.intake_id in kept:
                self._metrics.quarantined(item.field)
                log.warning(
                    events.QUARANTINED, field=item.field, reason=item.reason, body_bytes=len(item.raw_body)
                )
            else:  # the broker has delivered again what is there already, byte by byte
                self._metrics.duplicate("ignored")
                log.info(
                    events.DUPLICATE_IGNORED,
                    field=item.field,
                    body_bytes=len(item.raw_body),
                    status="quarantined",
                    redelivered=True,
                )
        self._on_malformed()


class _Candidate:
    """A request on its way into the table. told: the attempt as the upstream counted it."""

    __slots__ = ("delivery", "request", "told")

    def __init__(self, request: RetryRequest, delivery: Delivery) -> None:
        self.request = request
        self.delivery = delivery
        self.told = request.attempt


def _malformed(delivery: Delivery, problem: MalformedRequest) -> Malformed:
    reason = storable_text(str(problem), REASON_MAX_BYTES)
    return Malformed(
        problem.field, reason, delivery.body, delivery.properties, delivery.redelivered, delivery.intake_id
    )


async def _ended(connections: Collection[Connection]) -> set[Connection]:
    """Return those that do not answer any more: what they have delivered may have been given to others."""
    ended = set()
    for connection in connections:
        try:
            await connection.round_trip()
        except Unavailable:
            ended.add(connection)
    return ended


def _short(header: str | None) -> str | None:
    return header if header and len(header) <= TRACE_HEADER_MAX_CHARACTERS and "\0" not in header else None


def _fields(request: RetryRequest) -> dict[str, object]:
    return {
        "message_id": request.message_id,
        "original_queue": request.original_queue,
        "retry_count": request.retry_count,
        "error_reason": request.error_reason,
    }
