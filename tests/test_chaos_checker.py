"""The chaos test's checker, on histories made by hand: it finds each flaw, and complains of nothing else."""

from dataclasses import replace

import pytest

from chaos import conduct, duplicates
from chaos.checker import check, holds
from chaos.history import Event, Fault, History, InstanceEvent, Row
from chaos.safety import MOST_OUTSTANDING
from retry_scheduler.hand import MAX_OUTSTANDING
from retry_scheduler.observability import events
from tests.chaos_flaws import FLAWS
from tests.chaos_histories import (
    AGAIN,
    BROKER_FAULT,
    DELIVERED_AND_REVIEWED,
    DELIVERY,
    EXCUSED,
    EXPLAINED,
    FULL,
    GOOD,
    ID,
    KILL,
    LATER,
    PID,
    REQUEST,
    RETRY_ID,
    ROWS,
    with_delivery,
)
from tests.contract import MOST_DUPLICATES


def violated(history: History) -> set[str]:
    return {finding.invariant for finding in check(history) if finding.violations}


def test_a_history_without_a_fault_and_without_a_flaw_holds() -> None:
    assert holds(check(GOOD)), violated(GOOD)


def test_the_checker_knows_the_sentences_and_the_bound_of_the_service() -> None:
    assert duplicates.UNKNOWN == (events.RETRY_UNKNOWN, events.RETRY_SUSPECT)
    assert duplicates.OVERTAKEN == events.RETRY_OVERTAKEN
    assert duplicates.BURIED == events.INSTANCE_BURIED
    assert duplicates.UNSETTLED == events.UNSETTLED
    assert duplicates.MALFORMED_MOVED == events.QUARANTINE_DELIVERED
    assert conduct.SCHEDULED == events.RETRY_SCHEDULED
    assert conduct.NOT_DELIVERED == events.RETRY_NOT_DELIVERED
    assert conduct.ENDS == (events.RETRY_EXECUTED, events.EXHAUSTED, events.UNDELIVERABLE)
    assert MOST_OUTSTANDING == MOST_DUPLICATES == MAX_OUTSTANDING


@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_is_found_and_only_the_invariants_it_violates_say_so(flaw: str) -> None:
    history, expected = FLAWS[flaw]

    assert violated(history) == expected


@pytest.mark.parametrize("reason", EXPLAINED)
def test_a_duplicate_with_a_reason_is_no_violation(reason: str) -> None:
    assert "I4" not in violated(EXPLAINED[reason])


@pytest.mark.parametrize("reason", EXCUSED)
def test_what_is_late_or_in_manual_review_for_a_reason_is_no_violation(reason: str) -> None:
    history = EXCUSED[reason]

    assert holds(check(history)), violated(history)


def test_a_delivery_before_a_kill_does_not_contradict_manual_review_after_it() -> None:
    without_a_reason = replace(DELIVERED_AND_REVIEWED, instance_events=GOOD.instance_events, faults=[FULL])

    assert "I3" not in violated(DELIVERED_AND_REVIEWED)
    assert "I3" in violated(without_a_reason)


def test_more_duplicates_than_the_contract_allows_are_a_violation_whatever_explains_them() -> None:
    unknown = [Event(12.0, PID, events.RETRY_UNKNOWN, RETRY_ID)] * 600
    many = [replace(AGAIN, at=14 + number / 1000) for number in range(600)]

    history = with_delivery(
        DELIVERY, *many, events=[*GOOD.events, *unknown], faults=[BROKER_FAULT], samples=[]
    )

    assert violated(history) == {"I4"}


def test_what_a_killed_process_has_not_said_is_no_violation() -> None:
    history = replace(
        GOOD,
        events=GOOD.events[2:],
        instance_events=[*GOOD.instance_events, InstanceEvent(11.0, "kill", "instance-1", PID)],
        samples=[],
    )

    assert holds(check(history)), violated(history)


def test_time_during_which_another_fault_keeps_a_server_away_does_not_count_as_healing() -> None:
    history = replace(
        GOOD,
        faults=[replace(BROKER_FAULT, healed=11.0), Fault("smother broker", "broker", 13.0, 29.5)],
        deliveries=[DELIVERY, replace(LATER, redelivered=True)],
    )

    assert violated(history) == set()


def test_what_a_killed_process_had_sent_may_arrive_after_one_outage_upon_the_other() -> None:
    history = with_delivery(
        DELIVERY,
        replace(AGAIN, at=19.0),
        faults=[
            replace(KILL, began=11.0),
            Fault("broker alarm", "broker", 10.0, 11.5),
            Fault("kill broker", "broker", 11.6, 16.0),
            Fault("freeze broker", "broker", 16.1, 18.9),
        ],
        instance_events=[*GOOD.instance_events, InstanceEvent(11.2, "kill", "instance-1", PID)],
    )

    assert "I4" not in violated(history)


def test_a_repeated_request_may_become_the_next_attempt() -> None:
    history = replace(
        GOOD,
        enqueues=[*GOOD.enqueues, replace(REQUEST, kind="repeat", invoked_at=11.0)],
        deliveries=[DELIVERY, replace(DELIVERY, at=12.0, retry_id=f"{ID}:1", retry_count=2)],
        rows=[*ROWS, Row(ID, 1, 3, "retried", created_at=11.1, finished_at=12.1)],
        events=[
            *GOOD.events,
            Event(11.2, PID, events.RETRY_SCHEDULED, f"{ID}:1"),
            Event(12.2, PID, events.RETRY_EXECUTED, f"{ID}:1"),
        ],
        samples=[],
    )

    assert holds(check(history)), violated(history)
