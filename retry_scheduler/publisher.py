"""Builds what goes out and sends it: retries to their original queues, the rest to manual review.

"What comes back" and "Manual review" in docs/contract.md are here. Which of the two ways a message takes is
the settler's decision.
"""

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
import structlog

from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.broker.publication import RETRY_ID, Publication
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.broker.spare_links import SpareLinks
from retry_scheduler.messages import ERROR_REASON_MAX_BYTES, ClaimedQuarantine, ClaimedRetry, storable_text
from retry_scheduler.observability import events
from retry_scheduler.suspicion import payload_may_go, travels_alone

# RabbitMQ 4 takes messages of up to 16 MiB unless told otherwise, and base64 adds a third. A
# well-formed request has passed this limit already; malformed input has not been encoded before.
QUARANTINE_COPY_MAX_BYTES = 11 * 1024 * 1024

SPARE_LINK_TIMEOUT_S = 5.0

# (place, outcome) of publications whose fate is known by now.
Wave = list[tuple[int, Outcome]]

# Called with the place of what is about to be sent alone.
Accuse = Callable[[int], Awaitable[None]]

Build = Callable[[int], Publication]

log = structlog.get_logger()

_encode_json = msgspec.json.Encoder().encode


def retry_publication(task: ClaimedRetry) -> Publication:
    """Return the message that goes back to the original queue. Raises ValueError if its payload is gone."""
    if task.payload is None:
        raise ValueError("the payload has been deleted")
    retry_id = task.retry_id
    headers: dict[str, str | int] = {
        "x-retry-count": task.retry_count + 1,
        RETRY_ID: retry_id,
        "x-retry-scheduler": "true",
    }
    if task.error_reason is not None:
        headers["x-original-error"] = storable_text(task.error_reason, ERROR_REASON_MAX_BYTES)
    if task.traceparent is not None:
        headers["traceparent"] = task.traceparent
    if task.tracestate is not None:
        headers["tracestate"] = task.tracestate
    return Publication(
        task.original_queue,
        key=retry_id,
        properties=encode_properties(headers, message_id=task.message_id),
        body=task.payload,
        claim=task.claims,
    )


def review_publication(task: ClaimedRetry, reason: str, queue: str, *, with_payload: bool) -> Publication:
    """Return the message that tells people about an attempt that ends here.

    reason: exhausted, unroutable or unpublishable. with_payload: False if the broker would not
    take it; the payload stays in the table.
    """
    headers: dict[str, str | int] = {
        "x-original-queue": task.original_queue,
        RETRY_ID: task.retry_id,
        "x-review-reason": reason,
    }
    if reason == "exhausted":
        headers["x-max-retries-exceeded"] = "true"
    if task.traceparent is not None:
        headers["traceparent"] = task.traceparent
    body = {
        "message_id": task.message_id,
        "original_queue": task.original_queue,
        "original_payload": base64.b64encode(task.payload).decode()
        if with_payload and task.payload is not None
        else None,
        "error_reason": task.error_reason,
        "retry_count": task.retry_count,
        "max_retries": task.max_retries,
        "failed_at": datetime.now(UTC).isoformat(),
        "reason": reason,
    }
    return Publication(
        queue,
        key=task.retry_id,
        properties=encode_properties(headers, message_id=task.message_id, content_type="application/json"),
        body=_encode_json(body),
        claim=task.claims,
    )


def quarantine_publication(kept: ClaimedQuarantine, queue: str, *, with_payload: bool) -> Publication:
    """Return the message that tells people about malformed input. Its payload is the whole input, base64.

    Input above QUARANTINE_COPY_MAX_BYTES stays in the table; quarantine_id tells where.
    """
    small = with_payload and len(kept.raw_body) <= QUARANTINE_COPY_MAX_BYTES
    body = {
        "message_id": None,
        "original_queue": None,
        "original_payload": base64.b64encode(kept.raw_body).decode() if small else None,
        "error_reason": kept.reason,
        "retry_count": None,
        "max_retries": None,
        "failed_at": kept.received_at,
        "reason": "malformed",
        "quarantine_id": kept.id,
    }
    headers: dict[str, str | int] = {RETRY_ID: kept.retry_id, "x-review-reason": "malformed"}
    return Publication(
        queue,
        key=kept.retry_id,
        properties=encode_properties(headers, content_type="application/json"),
        body=_encode_json(body),
        claim=kept.claims,
    )


class Publisher:
    """Sends attempts and quarantined input, and returns what became of each.

    What is suspected of making the broker close channels travels alone, one at a time, through a
    connection of its own: there it can harm nobody, and its guilt is certain. So does what seems to be too
    large for the broker: whoever has raised the limit need not tell us.
    """

    def __init__(self, link: PublishLink, *, spare_links: SpareLinks, manual_review_queue: str) -> None:
        """spare_links: for what must travel alone."""
        self._link = link
        self._spare_links = spare_links
        self._review_queue = manual_review_queue

    def publish(
        self,
        tasks: Sequence[ClaimedRetry],
        reasons: Sequence[str | None],
        still_ours: Callable[[], bool],
        accuse: Accuse,
    ) -> AsyncIterator[Wave]:
        """Send each attempt to manual review where it has a reason to, otherwise back to its queue.

        still_ours: asked before each few, and before each one that travels alone, since those may take
        long. accuse: called with the place of each one that travels alone, before anything is done with it.
        Yields outcomes in waves; UNSENDABLE: no message can be made of it.
        """

        def build(place: int) -> Publication:
            task, reason = tasks[place], reasons[place]
            if reason is None:
                return retry_publication(task)
            with_payload = payload_may_go(task.claims_unsettled)
            return review_publication(task, reason, self._review_queue, with_payload=with_payload)

        return self._send(build, [task.claims_unsettled for task in tasks], still_ours, accuse)

    def publish_quarantined(
        self, kept: Sequence[ClaimedQuarantine], still_ours: Callable[[], bool], accuse: Accuse
    ) -> AsyncIterator[Wave]:
        """Send malformed input to manual review. Otherwise as `publish`."""

        def build(place: int) -> Publication:
            with_payload = payload_may_go(kept[place].claims_unsettled)
            return quarantine_publication(kept[place], self._review_queue, with_payload=with_payload)

        return self._send(build, [item.claims_unsettled for item in kept], still_ours, accuse)

    def hold(self, task: ClaimedRetry | ClaimedQuarantine, reason: str | None) -> timedelta:
        """Return after how long to look again at a row whose destination does not confirm."""
        if isinstance(task, ClaimedRetry) and reason is None:
            queue = task.original_queue
        else:
            queue = self._review_queue
        return timedelta(seconds=self._link.hold_s(queue))

    async def restore_queues(self) -> None:
        """Create the manual review queue again, which seems to have been deleted. Raises Unavailable."""
        await self._link.restore_queues()

    async def _send(
        self, build: Build, unsettled: Sequence[int], still_ours: Callable[[], bool], accuse: Accuse
    ) -> AsyncIterator[Wave]:
        together: list[tuple[int, Publication]] = []
        alone: list[int] = []
        not_sendable: Wave = []
        for place, claims in enumerate(unsettled):
            if travels_alone(claims):
                alone.append(place)
            elif (publication := _built(build, place)) is None:
                not_sendable.append((place, Outcome.UNSENDABLE))
            elif not self._link.size_limit.admits(len(publication.body)):
                not_sendable.append((place, Outcome.TOO_LARGE))
            else:
                together.append((place, publication))
        if not_sendable:
            yield not_sendable
        if together:
            async for wave in self._link.waves([publication for _, publication in together], still_ours):
                yield [(together[index][0], outcome) for index, outcome in wave]
        if alone:
            async for wave in self._send_alone(alone, build, still_ours, accuse):
                yield wave

    async def _send_alone(
        self, places: Sequence[int], build: Build, still_ours: Callable[[], bool], accuse: Accuse
    ) -> AsyncIterator[Wave]:
        async with self._spare_links.lent() as link:
            for index, place in enumerate(places):
                await link.wait_until_ready(SPARE_LINK_TIMEOUT_S)
                if link.ready:
                    await accuse(place)
                if not link.ready or not still_ours():
                    yield [(rest, Outcome.NOT_SENT) for rest in places[index:]]
                    return
                publication = _built(build, place)
                if publication is None:
                    yield [(place, Outcome.UNSENDABLE)]
                else:
                    (outcome,) = await link.publish([publication])
                    if outcome is Outcome.CONFIRMED:
                        self._link.size_limit.confirmed(len(publication.body))
                    yield [(place, outcome)]


def _built(build: Build, place: int) -> Publication | None:
    """Return the publication, or None if none can be made: the row's fault, and no other's."""
    try:
        return build(place)
    except ValueError:
        return None
    except Exception:  # a bug of ours in building one message must not stop the others
        log.exception(events.UNBUILDABLE)
        return None
