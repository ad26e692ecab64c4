"""Header tables of every kind: the right values are found, damage is survived, and no queue stands still."""

import random
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from retry_scheduler.broker.properties import text_headers
from retry_scheduler.demo.team import retry_count_in
from tests.factories import make_request, new_id
from tests.header_tables import Entry, some_properties, some_table
from tests.raw_amqp import RawPublisher, Refused
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

NAMES = ("x-retry-id", "traceparent", "tracestate")
RAW_NAMES = tuple(name.encode() for name in NAMES)
COUNT = b"x-retry-count"

dice_of_hypothesis = st.randoms(use_true_random=False)


def is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def texts_among(table: list[Entry]) -> dict[str, str]:
    return {
        entry.name.decode(): entry.value.decode()
        for entry in table
        if entry.name in RAW_NAMES and entry.tag == "S"
    }


@settings(max_examples=1000, deadline=None)
@given(dice_of_hypothesis)
def test_texts_and_integers_are_found_in_any_table_and_behind_any_property(dice: Random) -> None:
    table = some_table(dice, (*RAW_NAMES, COUNT))
    raw = some_properties(dice, table)

    assert text_headers(raw, NAMES) == texts_among(
        [entry for entry in table if entry.tag != "S" or is_text(entry.value)]
    )
    integers = [
        int.from_bytes(entry.value, "big", signed=True)
        for entry in table
        if entry.name == COUNT and entry.tag == "l"
    ]
    assert retry_count_in(raw) == (integers[0] if integers else 0)


@settings(max_examples=1000, deadline=None)
@given(dice_of_hypothesis)
def test_without_a_table_nothing_is_found_whatever_else_is_there(dice: Random) -> None:
    raw = some_properties(dice, None)

    assert text_headers(raw, NAMES) == {}
    assert retry_count_in(raw) == 0


@settings(max_examples=1000, deadline=None)
@given(dice_of_hypothesis, st.data())
def test_what_is_cut_short_or_damaged_is_survived_and_yields_only_what_was_asked_for(
    dice: Random, data: st.DataObject
) -> None:
    raw = bytearray(some_properties(dice, some_table(dice, (*RAW_NAMES, COUNT))))
    del raw[data.draw(st.integers(min_value=0, max_value=len(raw))) :]
    for place in data.draw(st.lists(st.integers(min_value=0, max_value=max(len(raw) - 1, 0)), max_size=4)):
        if raw:
            raw[place] = data.draw(st.integers(min_value=0, max_value=255))

    assert text_headers(bytes(raw), NAMES).keys() <= set(NAMES)
    retry_count_in(bytes(raw))


async def test_no_header_table_that_the_broker_takes_stops_the_queue(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    broker_url: str,
) -> None:
    service = await start_service(RABBITMQ_PREFETCH="50")
    upstream.declare("orders")
    dice = random.Random(5)
    good: list[str] = []
    malformed: dict[bytes, bytes] = {}
    refused = 0

    remaining = iter(range(300))
    while (number := next(remaining, None)) is not None:
        try:
            with RawPublisher(broker_url) as publisher:
                while number is not None:
                    # The broker checks two itself: a user id must be ours, an expiration a number.
                    raw = some_properties(dice, some_table(dice, RAW_NAMES), flags=~(1 << 8 | 1 << 4))
                    if number % 3:
                        message_id = new_id()
                        publisher.publish(RETRY_QUEUE, raw, make_request(message_id=message_id))
                        good.append(message_id)
                    else:
                        publisher.publish(RETRY_QUEUE, raw, b"malformed %d" % number)
                        malformed[b"malformed %d" % number] = raw
                    number = next(remaining, None)
        except Refused:
            refused += 1
    messages = await upstream.receive("orders", len(good))
    reviews = await upstream.receive(REVIEW_QUEUE, len(malformed))
    await eventually(table.settled)

    assert len(good) + len(malformed) > 200, f"the broker refused {refused}"
    assert sorted(message.message_id for message in messages) == sorted(good)
    assert len(reviews) == len(malformed)
    kept = await table.fetch("SELECT raw_body, raw_properties FROM retry_quarantine")
    assert {row["raw_body"]: row["raw_properties"] for row in kept} == malformed
    assert upstream.depth(RETRY_QUEUE) == 0
    assert service.metrics().value("retry_reconnects_total") == 0
