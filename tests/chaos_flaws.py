"""Histories of the chaos test with one flaw each: what is wrong, and the invariants that must say so."""

from dataclasses import replace

from chaos.history import Arrival, Event, Fault, InstanceEvent, Quarantined
from retry_scheduler.observability import events
from tests.chaos_histories import (
    AGAIN,
    ALARM,
    BROKER_FAULT,
    CUT_OFF,
    DELIVERY,
    EXECUTED,
    FREEZE,
    FROZEN,
    FULL,
    GONE,
    GOOD,
    ID,
    KILL,
    LATE,
    LATER,
    ODD,
    OTHER_LINK_FAULT,
    OTHER_PID,
    PID,
    REQUEST,
    RETRY_ID,
    ROW,
    ROWS,
    SCHEDULED,
    counted,
    reviewed,
    unknown,
    with_delivery,
)
from tests.factories import new_id

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
        {"I3", "I7"},
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
    "I4 a duplicate said to be unknown, when the link of another instance was broken": (
        unknown(OTHER_LINK_FAULT),
        {"I4"},
    ),
    "I4 a duplicate said to be unknown, when the broker had an alarm": (unknown(ALARM), {"I4"}),
    "I4 a duplicate said to be unknown, when a queue was full": (unknown(FULL), {"I4"}),
    "I4 a duplicate long before the kill, when the link of another instance was broken": (
        with_delivery(
            DELIVERY,
            replace(AGAIN, at=10.9),
            instance_events=[*GOOD.instance_events, InstanceEvent(17.0, "kill", "instance-1", PID)],
            faults=[replace(CUT_OFF, instance="instance-2"), replace(KILL, began=17.0, healed=21.0)],
            healed_at=10.0,
            samples=[],
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
    "I7 in manual review as unroutable, though its queue is there": (reviewed("unroutable"), {"I7"}),
    "I7 in manual review as unroutable, though its queue had room again": (
        reviewed("unroutable", faults=[replace(FULL, began=1.0, healed=9.0)], healed_at=5.0),
        {"I7"},
    ),
    "I7 in manual review as unpublishable, which nothing is": (reviewed("unpublishable"), {"I7"}),
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
    "I9 nothing delivered for long after a fault, of which another outage was only a part": (
        replace(
            GOOD,
            faults=[replace(BROKER_FAULT, healed=11.0), Fault("stop broker", "broker", 13.0, 15.0)],
            deliveries=[DELIVERY, replace(LATER, redelivered=True)],
        ),
        {"I9"},
    ),
    "I9 never at rest": (replace(GOOD, quiet_at=None, left="pending 1"), {"I9"}),
    "I9 late while both servers work": (replace(GOOD, events=LATE), {"I9"}),
    "I9 late while a queue is full": (replace(GOOD, events=LATE, faults=[FULL]), {"I9"}),
    "I9 late while the link of another instance is broken": (
        replace(GOOD, events=LATE, faults=[OTHER_LINK_FAULT]),
        {"I9"},
    ),
    "I9 an instance that delivers nothing after its link was healed, while another does": (
        replace(
            GOOD,
            faults=[replace(OTHER_LINK_FAULT, began=1.5, healed=2.0)],
            instance_events=[*GOOD.instance_events, InstanceEvent(1.0, "start", "instance-2", OTHER_PID)],
            samples=[],
        ),
        {"I9"},
    ),
    "I9 an instance that works no more": (replace(GOOD, not_ready=["instance-1"]), {"I9"}),
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
