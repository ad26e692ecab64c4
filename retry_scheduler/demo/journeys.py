"""Tells for each message that has failed where it stands now. Pure: evidence in, journeys out.

ASKING     the consumer has failed and asks for a retry, which is not stored yet
WAITING    stored, not due yet           DUE   due, not settled yet
BACK       sent back to its queue, and the consumer has not got it yet
RECOVERED, REVIEW, QUARANTINED           the ends
"""

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto

from retry_scheduler.demo.evidence import Delivery, Evidence, Quarantined, Row


class State(Enum):
    """Where a message stands."""

    ASKING = auto()
    WAITING = auto()
    DUE = auto()
    BACK = auto()
    RECOVERED = auto()
    REVIEW = auto()
    QUARANTINED = auto()

    @property
    def is_end(self) -> bool:
        """Whether nothing more is going to happen to it."""
        return self in (State.RECOVERED, State.REVIEW, State.QUARANTINED)


@dataclass(frozen=True, slots=True)
class Journey:
    """One message. retries: made so far, or being waited for; of: at most, None if not known yet.

    since, until: when it was stored and when it is due, while it is WAITING; otherwise both are the
    time of the last change. plan, reason: of the consumer's story, empty for a stranger's message.
    """

    name: str
    plan: str
    reason: str
    state: State
    retries: int
    of: int | None
    since: datetime
    until: datetime
    failed_at: datetime
    remark: str = ""


def journeys(evidence: Evidence, now: datetime) -> list[Journey]:
    """Return the journeys of all messages that have failed at least once, the latest failure's first."""
    deliveries: dict[str, list[Delivery]] = defaultdict(list)
    rows: dict[str, list[Row]] = defaultdict(list)
    for delivery in evidence.deliveries:
        deliveries[delivery.message_id].append(delivery)
    for row in evidence.rows:
        rows[row.message_id].append(row)
    quarantined = {kept.message_id: kept for kept in evidence.quarantined if kept.message_id}
    failed = {delivery.message_id for delivery in evidence.deliveries if not delivery.succeeded}
    found = [
        _journey(
            evidence, message_id, deliveries[message_id], rows[message_id], quarantined.get(message_id), now
        )
        for message_id in failed | rows.keys() | quarantined.keys()
    ]
    return sorted(found, key=lambda journey: (journey.failed_at, journey.name), reverse=True)


def _journey(
    evidence: Evidence,
    message_id: str,
    deliveries: list[Delivery],
    rows: list[Row],
    quarantined: Quarantined | None,
    now: datetime,
) -> Journey:
    invoice = evidence.sent.get(message_id)
    times = [delivery.arrived_at for delivery in deliveries] + [row.created_at for row in rows]
    since = until = max(times, default=now)
    remark = ""
    last = max(rows, key=lambda row: row.retry_count, default=None)
    got = max((delivery.retry_count for delivery in deliveries), default=-1)
    success = next((delivery for delivery in deliveries if delivery.succeeded), None)
    retries = last.retry_count + 1 if last else 0
    if success is not None and (last is None or success.retry_count > last.retry_count):
        state, retries, since = State.RECOVERED, success.retry_count, success.arrived_at
    elif quarantined is not None:
        state, since, remark = State.QUARANTINED, quarantined.received_at, quarantined.field
    elif last is None or last.retry_count < got:
        state, retries = State.ASKING, got + 1
    elif last.status == "pending":
        state = State.WAITING if last.next_retry_at > now else State.DUE
        since, until = last.created_at, last.next_retry_at
    elif last.status == "retried":
        state = State.BACK
    else:
        state, retries, remark = State.REVIEW, last.retry_count, last.last_error or last.status
        since = last.finished_at or since
    return Journey(
        name=evidence.name_of(message_id),
        plan=invoice.plan if invoice else "",
        reason=invoice.reason if invoice else "",
        state=state,
        retries=retries,
        of=last.max_retries if last else None,
        since=since,
        until=max(since, until),
        failed_at=min([*times, *([quarantined.received_at] if quarantined else [])], default=now),
        remark=remark,
    )
