"""Histories of the chaos test made by hand: a good one, and odd ones that have their reasons."""

from collections.abc import Sequence
from dataclasses import replace

from chaos.history import (
    Arrival,
    Enqueue,
    Event,
    Fault,
    History,
    InstanceEvent,
    Quarantined,
    Row,
    Sample,
)
from retry_scheduler.observability import events
from tests.factories import new_id

ID, GONE, ODD = new_id(), new_id(), "5e" * 32
PID, OTHER_PID = 100, 200

REQUEST = Enqueue("valid", 10.0, "body", ID, 0, 3, "orders", "payload")
DELIVERY = Arrival(10.6, f"{ID}:0", "orders", "payload", message_id=ID, retry_count=1)
ROW = Row(ID, 0, 3, "retried", created_at=10.1, finished_at=10.7)
RETRY_ID = f"{ID}:0"
SCHEDULED = Event(10.2, PID, events.RETRY_SCHEDULED, RETRY_ID)
EXECUTED = Event(10.8, PID, events.RETRY_EXECUTED, RETRY_ID)
GONE_RETRY_ID = f"{GONE}:3"

GOOD = History(
    enqueues=[
        REQUEST,
        Enqueue("exhausted", 10.0, "body 2", GONE, 3, 3, "orders", "payload 2"),
        Enqueue("malformed", 10.0, ODD),
    ],
    deliveries=[DELIVERY],
    reviews=[
        Arrival(10.4, f"{GONE}:3", "review", "payload 2", False, GONE, 3, "exhausted"),
        Arrival(10.4, "quarantine:1", "review", ODD, reason="malformed"),
    ],
    instance_events=[InstanceEvent(1.0, "start", "instance-1", PID)],
    events=[
        SCHEDULED,
        EXECUTED,
        Event(10.2, PID, events.RETRY_SCHEDULED, GONE_RETRY_ID),
        Event(10.5, PID, events.EXHAUSTED, GONE_RETRY_ID),
    ],
    rows=[ROW, Row(GONE, 3, 3, "failed", 10.1, 10.4, "exhausted")],
    quarantined=[Quarantined(1, ODD, delivered=True)],
    samples=[
        Sample(5.0, "warm", "instance-1", PID, rss_kib=60_000, files=20),
        Sample(
            40.0,
            "end",
            "instance-1",
            PID,
            rss_kib=61_000,
            files=21,
            metrics={
                "retries_scheduled_total": 2,
                "retries_executed_total{success}": 1,
                "retries_exhausted_total": 1,
            },
        ),
    ],
    healed_at=20.0,
    quiet_at=25.0,
)

KILL = Fault("kill instance", "instance", 10.5, 12.0, "instance-1")
BROKER_FAULT = Fault("kill broker", "broker", 10.5, 12.0)
ALARM = Fault("broker alarm", "broker", 10.5, 12.0)
FULL = Fault("full queue", "broker", 10.0, 11.0)
LINK_FAULT = Fault("silence broker link", "broker link", 10.5, 12.0, "instance-1")
OTHER_LINK_FAULT = Fault("silence broker link", "broker link", 10.5, 12.0, "instance-2")
CUT_OFF = Fault("silence database link", "database link", 10.3, 16.0, "instance-1")
FROZEN = Fault("freeze instance", "instance", 10.65, 18.0, "instance-1")
FREEZE = [
    InstanceEvent(1.0, "start", "instance-1", PID),
    InstanceEvent(10.65, "freeze", "instance-1", PID),
    InstanceEvent(18.0, "thaw", "instance-1", PID),
]
AGAIN = replace(DELIVERY, at=14.0)
UNKNOWN = Event(12.0, PID, events.RETRY_UNKNOWN, RETRY_ID)
LATER = Arrival(30.0, f"{ID}:0", "orders", "payload", message_id=ID, retry_count=1)


def counted(history: History, **more: float) -> History:
    """The same, with counters that agree with its log."""
    warm, end = history.samples
    return replace(history, samples=[warm, replace(end, metrics={**end.metrics, **more})])


def with_delivery(*deliveries: Arrival, **changes: object) -> History:
    return replace(GOOD, deliveries=deliveries, **changes)  # type: ignore[arg-type]


ROWS = GOOD.rows
LATE = [SCHEDULED, replace(EXECUTED, late_ms=5500.0), *GOOD.events[2:]]
TO_PEOPLE = [SCHEDULED, Event(10.8, PID, events.UNDELIVERABLE, RETRY_ID), *GOOD.events[2:]]


def reviewed(reason: str, **changes: object) -> History:
    """The good history, but its delivery goes to people."""
    arrival = Arrival(10.6, RETRY_ID, "review", "payload", False, ID, 0, reason)
    return with_delivery(
        **{
            "reviews": [*GOOD.reviews, arrival],
            "rows": [replace(ROW, status="failed"), ROWS[1]],
            "events": TO_PEOPLE,
            "samples": [],
            **changes,
        }
    )


def unknown(fault: Fault, *more: Fault) -> History:
    """The good history with a duplicate that was said to be unknown."""
    return counted(
        with_delivery(DELIVERY, AGAIN, events=[*GOOD.events, UNKNOWN], faults=[fault, *more]),
        retry_publications_unknown_total=1,
    )


def explained(more: Sequence[Event] = (), **changes: object) -> History:
    return with_delivery(DELIVERY, AGAIN, events=[*GOOD.events, *more], **changes)


EXPLAINED = {
    "the broker's redelivery": with_delivery(DELIVERY, replace(AGAIN, redelivered=True)),
    "unknown while the broker was away": counted(
        explained([Event(12.0, PID, events.RETRY_UNKNOWN, RETRY_ID)], faults=[BROKER_FAULT]),
        retry_publications_unknown_total=1,
    ),
    "unknown while its own link was broken": unknown(LINK_FAULT),
    "unknown after a freeze of its own": counted(
        explained(
            [Event(18.2, PID, events.RETRY_UNKNOWN, RETRY_ID)], faults=[FROZEN], instance_events=FREEZE
        ),
        retry_publications_unknown_total=1,
    ),
    "published and then frozen": counted(
        explained(
            [Event(18.2, PID, events.RETRY_OVERTAKEN, RETRY_ID)], faults=[FROZEN], instance_events=FREEZE
        ),
        retry_stale_completions_total=1,
    ),
    "published and then buried by another": counted(
        explained(
            [
                Event(14.0, OTHER_PID, events.INSTANCE_BURIED, instance=f"host:{PID}"),
                Event(14.2, PID, events.RETRY_OVERTAKEN, RETRY_ID),
            ]
        ),
        retry_stale_completions_total=1,
    ),
    "published, cut off from the database, and then killed": explained(
        faults=[CUT_OFF, replace(KILL, began=15.0, healed=17.0)],
        instance_events=[*GOOD.instance_events, InstanceEvent(15.0, "kill", "instance-1", PID)],
    ),
    "published and then killed": explained(
        faults=[KILL],
        instance_events=[*GOOD.instance_events, InstanceEvent(11.0, "kill", "instance-1", PID)],
    ),
}

# Late, or in manual review, for a reason.
EXCUSED = {
    "late while its own link was broken": replace(
        GOOD, events=LATE, faults=[replace(LINK_FAULT, began=5.0, healed=7.0)]
    ),
    "late, after an instance whose link was broken had claimed it": replace(
        GOOD,
        events=LATE,
        faults=[replace(OTHER_LINK_FAULT, began=5.0, healed=7.0)],
        rows=[replace(ROW, claims=2), ROWS[1]],
    ),
    "unroutable, because its queue was full": reviewed(
        "unroutable",
        enqueues=[replace(REQUEST, queue="chaos.orders"), *GOOD.enqueues[1:]],
        faults=[FULL],
        healed_at=5.0,
    ),
    "unroutable, because its queue is not there": reviewed(
        "unroutable", enqueues=[replace(REQUEST, queue="chaos.nobody-is-here"), *GOOD.enqueues[1:]]
    ),
}

# Its queue was full when it was sent again.
DELIVERED_AND_REVIEWED = replace(
    reviewed(
        "unroutable",
        enqueues=[replace(REQUEST, queue="chaos.orders"), *GOOD.enqueues[1:]],
        faults=[replace(KILL, began=10.8, healed=12.0), replace(FULL, began=11.0, healed=16.0)],
        instance_events=[*GOOD.instance_events, InstanceEvent(10.9, "kill", "instance-1", PID)],
        healed_at=5.0,
        reviews=[*GOOD.reviews, Arrival(14.0, RETRY_ID, "review", "payload", False, ID, 0, "unroutable")],
        events=[SCHEDULED, Event(14.2, PID, events.UNDELIVERABLE, RETRY_ID), *GOOD.events[2:]],
    ),
    deliveries=[replace(DELIVERY, queue="chaos.orders")],
)
