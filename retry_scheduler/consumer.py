"""Turns messages on the retry queue into stored attempts: what has arrived, in one statement, one ack.

    received -> checked -> stored (commit) -> acknowledged
                       `-> quarantined (commit) -> acknowledged

A crash before the commit, or between commit and acknowledgement, makes the broker deliver again
with the redelivered flag; an attempt that is stored already is then left as it is.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import structlog

from retry_scheduler import failpoints
from retry_scheduler.agenda import Agenda
from retry_scheduler.backoff import BackoffPolicy
from retry_scheduler.broker.intake_link import Delivery, IntakeLink
from retry_scheduler.broker.properties import text_headers
from retry_scheduler.errors import MalformedRequest, Unavailable
from retry_scheduler.messages import RetryRequest, parse_request, storable_text
from retry_scheduler.observability import events
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.outage import OutageBackoff
from retry_scheduler.repeated_attempts import Candidate
from retry_scheduler.repository import Malformed, Repository
from retry_scheduler.request_store import RequestStore
from retry_scheduler.supervision import STEP_AT_LEAST_EVERY_S, Progress
from retry_scheduler.transfer import transfer_s

if TYPE_CHECKING:  # loading it would load OpenTelemetry
    from retry_scheduler.observability.tracing import Tracing

log = structlog.get_logger()

# W3C trace context allows 512 characters of tracestate at least; longer ones may be dropped.
TRACE_HEADERS = ("traceparent", "tracestate")
TRACE_HEADER_MAX_CHARACTERS = 1024

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
        self._metrics = metrics
        self._store = RequestStore(
            repository, agenda, metrics, policy=policy, on_step=partial(progress.moved, LOOP)
        )
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
        candidates: list[Candidate] = []
        malformed: list[Malformed] = []
        for delivery in batch:
            if delivery.done:  # by a try that failed later on
                continue
            try:
                candidates.append(Candidate(self._read(delivery), delivery))
            except MalformedRequest as problem:
                malformed.append(_malformed(delivery, problem))
            except Exception:  # a bug of ours in reading must not stop the other messages
                log.exception(events.UNREADABLE, body_bytes=len(delivery.body))
                malformed.append(
                    _malformed(delivery, MalformedRequest("body", "cannot be read (see the log)"))
                )
        failpoints.reach("before_store")
        refused = await self._store.store(candidates, again=again)
        malformed += [_malformed(candidate.delivery, problem) for candidate, problem in refused.items()]
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

    async def _quarantine(self, malformed: Sequence[Malformed]) -> None:
        self._progress.moved(LOOP, transfer_s(sum(len(item.raw_body) for item in malformed)))
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


def _malformed(delivery: Delivery, problem: MalformedRequest) -> Malformed:
    reason = storable_text(str(problem), REASON_MAX_BYTES)
    return Malformed(
        problem.field, reason, delivery.body, delivery.properties, delivery.redelivered, delivery.intake_id
    )


def _short(header: str | None) -> str | None:
    return header if header and len(header) <= TRACE_HEADER_MAX_CHARACTERS and "\0" not in header else None
