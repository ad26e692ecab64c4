"""Histories of the chaos test made by hand: a good one, some with one flaw each, and excused duplicates."""

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
FROZEN = Fault("freeze instance", "instance", 10.65, 18.0, "instance-1")
FREEZE = [
    InstanceEvent(1.0, "start", "instance-1", PID),
    InstanceEvent(10.65, "freeze", "instance-1", PID),
    InstanceEvent(18.0, "thaw", "instance-1", PID),
]
AGAIN = replace(DELIVERY, at=14.0)
LATER = Arrival(30.0, f"{ID}:0", "orders", "payload", message_id=ID, retry_count=1)


def counted(history: History, **more: float) -> History:
    """The same, with counters that agree with its log."""
    warm, end = history.samples
    return replace(history, samples=[warm, replace(end, metrics={**end.metrics, **more})])


def with_delivery(*deliveries: Arrival, **changes: object) -> History:
    return replace(GOOD, deliveries=deliveries, **changes)  # type: ignore[arg-type]


ROWS = GOOD.rows
# What is wrong, the history, and the invariants that must say so.
FLAWS = {
    "I1 an accepted message that nobody has got": (
        with_delivery(rows=ROWS[1:], events=GOOD.events[2:], samples=[]),
        {"I1"},
    ),
    "I1 a row that is still pending": (
        replace(GOOD, rows=[replace(ROW, status="pending", finished_at=None), ROWS[1]]),
        {"I1"},
    ),
    "I1 malformed input that manual review has not got": (
        replace(GOOD, quarantined=[Quarantined(1, ODD, delivered=False)], reviews=GOOD.reviews[:1]),
        {"I1"},
    ),
    "I1 malformed input that was dropped": (
        replace(GOOD, quarantined=[], reviews=GOOD.reviews[:1]),
        {"I1"},
    ),
    "I2 a message that was never sent": (
        with_delivery(DELIVERY, replace(DELIVERY, retry_id=f"{new_id()}:0")),
        {"I2"},
    ),
    "I2 a payload that has changed": (with_delivery(replace(DELIVERY, sha256="other")), {"I2"}),
    "I2 another message_id": (with_delivery(replace(DELIVERY, message_id=GONE)), {"I2"}),
    "I2 another queue": (with_delivery(replace(DELIVERY, queue="invoices")), {"I2"}),
    "I2 another x-retry-count": (with_delivery(replace(DELIVERY, retry_count=2)), {"I2"}),
    "I2 a delivery without x-retry-id": (
        with_delivery(DELIVERY, replace(DELIVERY, retry_id="None")),
        {"I2"},
    ),
    "I2 malformed input that has changed": (
        replace(GOOD, reviews=[GOOD.reviews[0], replace(GOOD.reviews[1], sha256="other")]),
        {"I2"},
    ),
    "I2 an attempt that nobody has asked for": (
        replace(
            GOOD,
            rows=[*ROWS, replace(ROW, retry_count=1)],
            deliveries=[DELIVERY, replace(DELIVERY, retry_id=f"{ID}:1", retry_count=2)],
            events=[
                *GOOD.events,
                replace(SCHEDULED, retry_id=f"{ID}:1"),
                replace(EXECUTED, retry_id=f"{ID}:1"),
            ],
            samples=[],
        ),
        {"I2"},
    ),
    "I3 retried in the table, and at no consumer": (
        replace(GOOD, deliveries=[], enqueues=[replace(REQUEST, outcome="info"), *GOOD.enqueues[1:]]),
        {"I3", "I5"},
    ),
    "I3 failed in the table, and at a consumer as well": (
        replace(
            GOOD,
            rows=[replace(ROW, status="failed"), ROWS[1]],
            reviews=[
                *GOOD.reviews,
                Arrival(10.6, f"{ID}:0", "review", "payload", False, ID, 0, "unroutable"),
            ],
        ),
        {"I3"},
    ),
    "I3 two rows for one attempt": (replace(GOOD, rows=[*ROWS, ROW]), {"I3", "I2"}),
    "I3 noted as delivered, and not in manual review": (
        replace(
            GOOD,
            reviews=GOOD.reviews[:1],
            enqueues=[*GOOD.enqueues[:2], replace(GOOD.enqueues[2], outcome="info")],
        ),
        {"I3"},
    ),
    "I4 a duplicate without a fault": (with_delivery(DELIVERY, AGAIN), {"I4"}),
    "I4 a duplicate said to be unknown, without a fault": (
        counted(
            with_delivery(
                DELIVERY, AGAIN, events=[*GOOD.events, Event(12.0, PID, events.RETRY_UNKNOWN, RETRY_ID)]
            ),
            retry_publications_unknown_total=1,
        ),
        {"I4"},
    ),
    "I4 a third delivery for one unknown": (
        counted(
            with_delivery(
                DELIVERY,
                AGAIN,
                replace(AGAIN, at=15.0),
                events=[*GOOD.events, Event(12.0, PID, events.RETRY_UNKNOWN, RETRY_ID)],
                faults=[BROKER_FAULT],
            ),
            retry_publications_unknown_total=1,
        ),
        {"I4"},
    ),
    "I4 two instances that claim the same, each overtaken by the other": (
        counted(
            with_delivery(
                DELIVERY, AGAIN, events=[*GOOD.events, Event(14.5, PID, events.RETRY_OVERTAKEN, RETRY_ID)]
            ),
            retry_stale_completions_total=1,
        ),
        {"I4"},
    ),
    "I4 an instance that thaws and publishes what others have taken over": (
        counted(
            with_delivery(
                AGAIN,
                replace(DELIVERY, at=18.1),
                instance_events=FREEZE,
                faults=[FROZEN],
                events=[*GOOD.events, Event(18.2, PID, events.RETRY_OVERTAKEN, RETRY_ID)],
            ),
            retry_stale_completions_total=1,
        ),
        {"I4"},
    ),
    "I4 a duplicate long before the kill": (
        with_delivery(
            DELIVERY,
            replace(AGAIN, at=10.9),
            instance_events=[*GOOD.instance_events, InstanceEvent(17.0, "kill", "instance-1", PID)],
            faults=[replace(KILL, began=17.0, healed=21.0)],
            samples=[],
        ),
        {"I4"},
    ),
    "I4 a manual review that comes twice": (
        replace(GOOD, reviews=[*GOOD.reviews, replace(GOOD.reviews[0], at=12.0)]),
        {"I4"},
    ),
    "I5 stored, and then lost": (
        replace(
            GOOD,
            enqueues=[replace(REQUEST, outcome="info"), *GOOD.enqueues[1:]],
            deliveries=[],
            rows=[replace(ROW, status="discarded"), ROWS[1]],
        ),
        {"I5"},
    ),
    "I6 before its backoff is over": (with_delivery(replace(DELIVERY, at=10.2)), {"I6"}),
    "I6 before the delay that it asks for": (
        replace(GOOD, enqueues=[replace(REQUEST, least_delay_ms=900), *GOOD.enqueues[1:]]),
        {"I6"},
    ),
    "I7 exhausted, and back in its queue": (
        replace(
            GOOD,
            enqueues=[replace(REQUEST, max_retries=0), *GOOD.enqueues[1:]],
            rows=[replace(ROW, max_retries=0), ROWS[1]],
        ),
        {"I7"},
    ),
    "I7 not exhausted, and in manual review as exhausted": (
        replace(GOOD, rows=[ROW, replace(ROWS[1], max_retries=5)]),
        {"I7"},
    ),
    "I7 a reason that the contract does not know": (
        replace(GOOD, reviews=[replace(GOOD.reviews[0], reason="tired"), GOOD.reviews[1]]),
        {"I7"},
    ),
    "I8 a counter that says less than the log": (counted(GOOD, retries_scheduled_total=1), {"I8"}),
    "I8 a counter that says more than the log": (
        counted(GOOD, retry_publications_unknown_total=1),
        {"I8"},
    ),
    "I8 a counter that falls": (
        replace(
            GOOD,
            samples=[
                replace(GOOD.samples[0], metrics={"retries_scheduled_total": 3}),
                GOOD.samples[1],
            ],
        ),
        {"I8"},
    ),
    "I8 reported as executed by two instances": (
        replace(GOOD, events=[*GOOD.events, replace(EXECUTED, at=18.0, pid=OTHER_PID)]),
        {"I8"},
    ),
    "I8 stored without a word": (
        counted(replace(GOOD, events=GOOD.events[1:]), retries_scheduled_total=1),
        {"I8"},
    ),
    "I8 ended without a word": (
        counted(
            replace(GOOD, events=[SCHEDULED, *GOOD.events[2:]]), **{"retries_executed_total{success}": 0}
        ),
        {"I8"},
    ),
    "I9 nothing delivered for long after a fault": (
        replace(
            GOOD,
            faults=[replace(BROKER_FAULT, healed=11.0)],
            deliveries=[DELIVERY, replace(LATER, redelivered=True)],
        ),
        {"I9"},
    ),
    "I9 never at rest": (replace(GOOD, quiet_at=None, left="pending 1"), {"I9"}),
    "I9 late while both servers work": (
        replace(GOOD, events=[SCHEDULED, replace(EXECUTED, late_ms=5500.0), *GOOD.events[2:]]),
        {"I9"},
    ),
    "I9 at rest too late": (replace(GOOD, quiet_at=90.0), {"I9"}),
    "I9 a process that ended by itself and was started again": (
        replace(
            GOOD,
            instance_events=[
                InstanceEvent(0.5, "start", "instance-1", OTHER_PID),
                *GOOD.instance_events,
            ],
        ),
        {"I9"},
    ),
    "I9 a process that does not answer at the end": (
        replace(
            GOOD,
            instance_events=[*GOOD.instance_events, InstanceEvent(1.0, "start", "instance-2", OTHER_PID)],
        ),
        {"I9"},
    ),
    "I10 memory that grows": (
        replace(GOOD, samples=[GOOD.samples[0], replace(GOOD.samples[1], rss_kib=120_000)]),
        {"I10"},
    ),
    "I10 files that stay open": (
        replace(GOOD, samples=[GOOD.samples[0], replace(GOOD.samples[1], files=80)]),
        {"I10"},
    ),
    "I10 too many database connections": (replace(GOOD, connections=21, connections_most=20), {"I10"}),
    "I10 a traceback in the log": (replace(GOOD, complaints=["Traceback"]), {"I10"}),
    "I11 a password in the log": (replace(GOOD, leaks=["instance-1.log holds it"]), {"I11"}),
}


def explained(more: Sequence[Event] = (), **changes: object) -> History:
    return with_delivery(DELIVERY, AGAIN, events=[*GOOD.events, *more], **changes)


EXPLAINED = {
    "the broker's redelivery": with_delivery(DELIVERY, replace(AGAIN, redelivered=True)),
    "unknown while the broker was away": counted(
        explained([Event(12.0, PID, events.RETRY_UNKNOWN, RETRY_ID)], faults=[BROKER_FAULT]),
        retry_publications_unknown_total=1,
    ),
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
    "published and then killed": explained(
        faults=[KILL],
        instance_events=[*GOOD.instance_events, InstanceEvent(11.0, "kill", "instance-1", PID)],
    ),
}
