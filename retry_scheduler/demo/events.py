"""Turns evidence into events, one sentence each. Pure, except that a teller remembers what it has told."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from retry_scheduler.demo.evidence import Delivery, Evidence, Row


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. key: the same whenever it is seen again."""

    key: tuple[object, ...]
    at: datetime
    name: str
    text: str


class EventTeller:
    """Tells each event once."""

    def __init__(self) -> None:
        self._told: set[tuple[object, ...]] = set()

    def news(self, evidence: Evidence, until: datetime) -> list[Event]:
        """Return what has happened up to `until` and was not told before, oldest first.

        until: some tenths of a second ago, so that what was looked at last cannot belong before it.
        """
        news = sorted(
            (event for event in _events(evidence) if event.at <= until and event.key not in self._told),
            key=lambda event: event.at,
        )
        self._told |= {event.key for event in news}
        return news


def _events(evidence: Evidence) -> Iterator[Event]:
    due = {(row.message_id, row.retry_count): row.next_retry_at for row in evidence.rows}
    for place, delivery in enumerate(evidence.deliveries):
        if delivery.retry_count or not delivery.succeeded or delivery.message_id not in evidence.sent:
            text = _delivered(delivery, due.get((delivery.message_id, delivery.retry_count - 1)))
            invoice = evidence.sent.get(delivery.message_id)
            if invoice and not delivery.succeeded:
                text += f" ({invoice.reason})"
            name = evidence.name_of(delivery.message_id)
            yield Event(("delivery", place), delivery.arrived_at, name, text)
    for row in evidence.rows:
        name = evidence.name_of(row.message_id)
        key = (row.message_id, row.retry_count)
        yield Event(("stored", *key), row.created_at, name, _stored(row))
        if row.status not in ("pending", "retried") and row.finished_at:
            text = f"is in manual review ({row.last_error or row.status}): a person decides"
            yield Event((row.status, *key), row.finished_at, name, text)
    for kept in evidence.quarantined:
        name = evidence.name_of(kept.message_id)
        text = f"its request is malformed ({kept.field}): quarantined"
        yield Event(("quarantined", kept.id), kept.received_at, name, text)
        if kept.delivered_at:
            text = "is in manual review (malformed): a person decides"
            yield Event(("delivered", kept.id), kept.delivered_at, name, text)


def _delivered(delivery: Delivery, due_at: datetime | None) -> str:
    outcome = "succeeds" if delivery.succeeded else "fails"
    if not delivery.retry_count:
        return f"comes and {outcome}"
    late = (
        ""
        if due_at is None
        else f", {(delivery.arrived_at - due_at).total_seconds() * 1000:.1f} ms after due"
    )
    return f"comes back as retry {delivery.retry_count}{late}, and {outcome}"


def _stored(row: Row) -> str:
    if row.retry_count >= row.max_retries:
        return f"all {row.max_retries} retries are used up"
    wait_s = (row.next_retry_at - row.created_at).total_seconds()
    return f"stored in PostgreSQL; retry {row.retry_count + 1} of {row.max_retries} is due in {wait_s:.2f} s"
