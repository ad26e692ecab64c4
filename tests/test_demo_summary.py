"""The demo's judgement is not fooled, and what it shows fits and is in order. No servers: see test_demo."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.demo.events import EventTeller
from retry_scheduler.demo.evidence import Delivery, Evidence, Quarantined, ReviewCopy, Row
from retry_scheduler.demo.invoices import ALWAYS, Invoice, make_invoices
from retry_scheduler.demo.summary import percentile, summarise
from retry_scheduler.demo.team import retry_count_in, retry_request
from retry_scheduler.demo.view import Picture
from retry_scheduler.errors import MalformedRequest
from retry_scheduler.messages import parse_request

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
LATE = timedelta(milliseconds=4)
MAX_RETRIES = 3


def test_a_run_without_fault_is_judged_right() -> None:
    summary = summarise(good_evidence())

    assert summary.problems == []
    assert (summary.sent, summary.at_once, summary.recovered) == (46, 32, {1: 6, 2: 3, 3: 2})
    assert (summary.in_review, summary.quarantined) == (2, 1)
    assert (summary.lost, summary.duplicates, summary.changed) == (0, 0, 0)
    assert summary.lateness_ms == pytest.approx([4.0] * 24)


def test_a_lost_message_is_noticed() -> None:
    good = good_evidence()
    victim = next(delivery for delivery in good.deliveries if delivery.succeeded and delivery.retry_count)

    summary = summarise(replace(good, deliveries=[one for one in good.deliveries if one is not victim]))

    assert summary.lost == 1
    assert f"lost: {good.name_of(victim.message_id)} has come to no end" in summary.problems


def test_a_duplicate_delivery_is_noticed() -> None:
    good = good_evidence()
    again = next(delivery for delivery in good.deliveries if delivery.retry_count)

    summary = summarise(replace(good, deliveries=[*good.deliveries, again]))

    assert summary.duplicates == 1
    assert problem_subjects(summary.problems) == ["duplicates"]


def test_a_second_copy_in_manual_review_is_noticed() -> None:
    good = good_evidence()

    summary = summarise(replace(good, copies=[*good.copies, good.copies[0]]))

    assert summary.duplicates == 1
    assert problem_subjects(summary.problems) == ["duplicates", "queue manual-review.pending"]


@pytest.mark.parametrize(
    ("status", "becomes", "subjects"),
    [
        ("retried", "pending", ["rows still pending", "rows `retried`, and retries that came"]),
        ("failed", "pending", ["lost", "rows still pending", "rows `failed`, and copies in manual review"]),
        (
            "failed",
            "retried",
            ["lost", "rows `retried`, and retries that came", "rows `failed`, and copies in manual review"],
        ),
        (
            "retried",
            "failed",
            [
                "wrong end",
                "rows `retried`, and retries that came",
                "rows `failed`, and copies in manual review",
            ],
        ),
    ],
)
def test_a_wrong_status_is_noticed(status: str, becomes: str, subjects: list[str]) -> None:
    good = good_evidence()
    recovering = {delivery.message_id for delivery in good.deliveries if delivery.succeeded}
    victim = next(
        row
        for row in good.rows
        if row.status == status and (row.message_id in recovering) == (status == "retried")
    )
    rows = [replace(row, status=becomes) if row is victim else row for row in good.rows]

    assert problem_subjects(summarise(replace(good, rows=rows)).problems) == subjects


def test_a_missing_row_is_noticed() -> None:
    good = good_evidence()

    problems = summarise(replace(good, rows=good.rows[1:])).problems

    assert problem_subjects(problems) == [
        "rows `retried`, and retries that came",
        "failures of the consumer, and rows",
    ]


def test_a_message_left_in_a_queue_is_noticed() -> None:
    good = good_evidence()

    problems = summarise(replace(good, depths={**good.depths, "orders": 1})).problems

    assert problems == ["queue orders: holds 1 messages, should hold 0"]


def test_a_retry_that_came_early_is_noticed() -> None:
    good = good_evidence()
    early = next(delivery for delivery in good.deliveries if delivery.retry_count)
    sooner = replace(early, arrived_at=early.arrived_at - LATE - timedelta(milliseconds=1.5))

    problems = summarise(replace(good, deliveries=swapped(good.deliveries, early, sooner))).problems

    assert problems == ["early: a retry came 1.5 ms before it was due"]


def test_a_changed_body_is_noticed() -> None:
    good = good_evidence()
    victim = good.deliveries[-1]
    other = replace(victim, body=victim.body + b" ")

    summary = summarise(replace(good, deliveries=swapped(good.deliveries, victim, other)))

    assert summary.changed == 1
    assert summary.problems == ["bodies: 1 deliveries were not what had been sent"]


def test_a_demo_in_which_nothing_happened_is_not_right() -> None:
    assert problem_subjects(summarise(Evidence({}, [], [], [], [])).problems) == ["sent", "lateness"]


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2.0), (0.99, 4.0), (0.0, 1.0), (1.0, 4.0)])
def test_a_percentile_is_one_of_the_values(share: float, expected: float) -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], share) == expected


def test_the_team_asks_for_retries_as_the_contract_says_in_both_forms_and_once_wrongly() -> None:
    forms = set()
    for invoice in make_invoices():
        body = retry_request(invoice, invoice.body, retry_count=2)
        forms.add(b'"Buffer"' in body)
        if invoice.malformed:
            with pytest.raises(MalformedRequest, match="original_payload"):
                parse_request(body, own_queues=(), default_max_retries=MAX_RETRIES)
        else:
            request = parse_request(body, own_queues=(), default_max_retries=MAX_RETRIES)

            assert (request.attempt, request.payload) == ((invoice.message_id, 2), invoice.body)
    assert forms == {True, False}


def test_the_consumer_reads_the_retry_count_from_its_header() -> None:
    assert retry_count_in(encode_properties({"x-retry-count": 7, "x-retry-id": "a:6"}, message_id="a")) == 7
    assert retry_count_in(encode_properties({"x-retry-id": "a:sent"})) == 0


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40), (200, 60), (60, 12)])
@pytest.mark.parametrize("seconds", [0, 1, 3, 9, 30])
def test_the_picture_fits_its_terminal(columns: int, lines: int, seconds: int) -> None:
    now = BEGAN + timedelta(seconds=seconds)
    seen = as_seen_at(good_evidence(), now)
    console = Console(width=columns, color_system=None)

    with console.capture() as captured:
        console.print(
            Picture(["explained"] * 2, BEGAN).screen(
                seen, EventTeller().news(seen, now), now=now, columns=columns, lines=lines
            )
        )

    drawn = captured.get().splitlines()
    failing = [invoice.number for invoice in make_invoices() if invoice.fails]
    assert len(drawn) <= lines
    assert max(len(line) for line in drawn) <= columns
    if seconds == 30 and lines >= 24:
        assert [number for number in reversed(failing) if any(number in line for line in drawn)] == failing[
            ::-1
        ]


def test_every_event_is_told_once_and_in_order() -> None:
    teller = EventTeller()
    good = good_evidence()

    told = [
        event
        for second in range(30)
        for event in teller.news(
            as_seen_at(good, BEGAN + timedelta(seconds=second)), BEGAN + timedelta(seconds=second)
        )
    ]

    assert [event.at for event in told] == sorted(event.at for event in told)
    assert len({event.key for event in told}) == len(told)
    assert sum("is in manual review" in event.text for event in told) == 3
    assert sum("comes back" in event.text for event in told) == 24


def problem_subjects(problems: object) -> list[str]:
    """Return what the problems are about."""
    assert isinstance(problems, list)
    return [problem.partition(": ")[0] for problem in problems]


def swapped(deliveries: object, old: Delivery, new: Delivery) -> list[Delivery]:
    """Return the deliveries with one exchanged."""
    assert isinstance(deliveries, list)
    return [new if delivery is old else delivery for delivery in deliveries]


def good_evidence() -> Evidence:
    """Return what a run without fault leaves, every retry 4 ms late."""
    sent = {invoice.message_id: invoice for invoice in make_invoices()}
    evidence = Evidence(sent, [], [], [], [], {})
    deliveries, rows, quarantined, copies = [], [], [], []
    for place, invoice in enumerate(sent.values()):
        at = BEGAN + timedelta(seconds=place / 20)
        if invoice.malformed:
            deliveries.append(delivery_of(invoice, 0, at))
            quarantined.append(
                Quarantined(1, invoice.message_id, "original_payload", at + LATE, at + 2 * LATE)
            )
            copies.append(ReviewCopy(invoice.message_id, "malformed"))
            continue
        for retry_count in range(min(invoice.fails, MAX_RETRIES) + 1):
            deliveries.append(delivery_of(invoice, retry_count, at))
            if retry_count < min(invoice.fails, MAX_RETRIES):
                due_at = at + timedelta(seconds=2 ** (retry_count + 1))
                rows.append(row_of(invoice, retry_count, "retried", at, due_at))
                at = due_at + LATE
        if invoice.fails == ALWAYS:
            rows.append(row_of(invoice, MAX_RETRIES, "failed", at, at))
            copies.append(ReviewCopy(invoice.message_id, "exhausted"))
    deliveries.sort(key=lambda delivery: delivery.arrived_at)
    depths = {"orders": 0, "retry.scheduled": 0, "manual-review.pending": len(copies)}
    return replace(
        evidence, deliveries=deliveries, rows=rows, quarantined=quarantined, copies=copies, depths=depths
    )


def delivery_of(invoice: Invoice, retry_count: int, at: datetime) -> Delivery:
    return Delivery(invoice.message_id, retry_count, at, retry_count >= invoice.fails, invoice.body)


def row_of(invoice: Invoice, retry_count: int, status: str, at: datetime, due_at: datetime) -> Row:
    return Row(invoice.message_id, retry_count, MAX_RETRIES, status, at, due_at, due_at + LATE / 2, None)


def as_seen_at(evidence: Evidence, now: datetime) -> Evidence:
    """Return the evidence as somebody has it who looks at `now`."""
    return replace(
        evidence,
        deliveries=[delivery for delivery in evidence.deliveries if delivery.arrived_at <= now],
        rows=[
            row
            if row.finished_at and row.finished_at <= now
            else replace(row, status="pending", finished_at=None)
            for row in evidence.rows
            if row.created_at <= now
        ],
        quarantined=[kept for kept in evidence.quarantined if kept.received_at <= now],
    )
