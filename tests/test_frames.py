"""The short way for messages: the same bytes as pika's, and nothing taken that is not whole."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import frame, spec

from retry_scheduler.broker.frames import message_frames, whole_delivery
from retry_scheduler.broker.intake_link import IntakeLink
from retry_scheduler.broker.properties import RawProperties, encode_properties
from tests.upstream import Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

MAX_BODY = 50

PROPERTIES = st.builds(
    encode_properties,
    st.dictionaries(
        st.text(max_size=20), st.text(max_size=20) | st.integers(-(2**63), 2**63 - 1), max_size=4
    ),
    message_id=st.none() | st.text(max_size=30),
)
NAMES = st.text(st.characters(codec="utf-8"), max_size=60)


def by_pika(data: bytes) -> Iterator[frame.Frame]:
    """Decode frames the slow way."""
    while data:
        taken, value = frame.decode_frame(data)
        assert taken, "an incomplete frame"
        data = data[taken:]
        yield value


def delivery(consumer: str, tag: int, redelivered: bool, queue: str, properties: bytes, body: bytes) -> bytes:
    """Return the frames of a delivery as pika writes them."""
    method = spec.Basic.Deliver(consumer, tag, redelivered, "", queue)
    frames = [frame.Method(1, method), frame.Header(1, len(body), RawProperties(properties))]
    if body:
        frames.append(frame.Body(1, body))
    return b"".join(each.marshal() for each in frames)


@given(NAMES, PROPERTIES, st.binary(max_size=3 * MAX_BODY))
def test_pika_reads_what_we_write(queue: str, properties: bytes, body: bytes) -> None:
    method, header, *pieces = by_pika(b"".join(message_frames(7, queue, properties, body, MAX_BODY)))

    assert {each.channel_number for each in (method, header, *pieces)} == {7}
    assert (method.method.exchange, method.method.routing_key) == ("", queue)
    assert (method.method.mandatory, method.method.immediate) == (True, False)
    assert (header.properties.raw, header.body_size) == (properties, len(body))
    assert b"".join(piece.fragment for piece in pieces) == body
    assert all(len(piece.fragment) <= MAX_BODY for piece in pieces)


def test_a_queue_name_that_amqp_cannot_say_is_refused() -> None:
    assert message_frames(1, "q" * 255, b"\0\0", b"", MAX_BODY)
    with pytest.raises(ValueError, match="255 bytes"):
        message_frames(1, "\N{LATIN SMALL LETTER C WITH CARON}" * 128, b"\0\0", b"", MAX_BODY)


@given(
    st.binary(max_size=20),
    st.text(max_size=60),
    st.integers(0, 2**64 - 1),
    st.booleans(),
    NAMES,
    PROPERTIES,
    st.binary(max_size=200),
    st.binary(max_size=20),
)
def test_we_read_what_pika_writes(
    before: bytes,
    consumer: str,
    tag: int,
    redelivered: bool,
    queue: str,
    properties: bytes,
    body: bytes,
    after: bytes,
) -> None:
    message = delivery(consumer, tag, redelivered, queue, properties, body)

    found = whole_delivery(before + message + after, len(before))

    assert found == (tag, redelivered, properties, body, len(before) + len(message))


def test_a_delivery_that_is_not_whole_is_left_to_pika() -> None:
    message = delivery("consumer", 1, False, "orders", encode_properties({"key": "value"}), b"body")
    # Below this, the loop that asks does not ask.
    for length in range(7, len(message)):
        assert whole_delivery(message[:length], 0) is None, length


def test_a_body_in_two_frames_is_left_to_pika() -> None:
    method = spec.Basic.Deliver("consumer", 1, False, "", "orders")
    header = frame.Header(1, 8, RawProperties(b"\0\0"))
    frames = [frame.Method(1, method), header, frame.Body(1, b"half"), frame.Body(1, b"half")]

    assert whole_delivery(b"".join(each.marshal() for each in frames), 0) is None


def test_another_method_is_left_to_pika() -> None:
    following = delivery("consumer", 1, False, "orders", b"\0\0", b"body")
    for method in (
        spec.Basic.Ack(1, True),
        spec.Basic.CancelOk("consumer"),
        spec.Channel.Close(406, "no", 0, 0),
    ):
        assert whole_delivery(frame.Method(1, method).marshal() + following, 0) is None


@given(st.data())
def test_damaged_bytes_never_raise_and_are_never_taken_for_more_than_there_is(data: st.DataObject) -> None:
    message = bytearray(delivery("consumer", 1, False, "orders", encode_properties({"k": "v"}), b"body"))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))

    found = whole_delivery(bytes(message), 0)

    assert found is None or found[-1] <= len(message)


async def test_messages_of_all_sizes_arrive_in_order_whichever_way_they_take(
    broker_url: str, upstream: Upstream
) -> None:
    """Small ones come many in one read, some cut at its end; those above a frame come in pieces."""
    upstream.declare("orders")
    sizes = [0, 1, 700, 1_500, 0, 131_064, 131_065, 3_000, 400_000] * 40
    for place, size in enumerate(sizes):
        upstream.ask(place.to_bytes(4, "big") + bytes(size), queue="orders")
    link = IntakeLink(
        broker_url, queue="orders", queues=(), prefetch=0, name="test", on_problem=lambda problem: None
    )
    running = asyncio.create_task(link.run())
    arrived = []

    def all_have_arrived() -> bool:
        arrived.extend(link.take_arrived())
        return len(arrived) >= len(sizes)

    try:
        await eventually(all_have_arrived)
        link.acknowledge(arrived)
        await link.round_trip()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    assert [each.body for each in arrived] == [
        place.to_bytes(4, "big") + bytes(size) for place, size in enumerate(sizes)
    ]
    assert [each.tag for each in arrived] == list(range(1, len(sizes) + 1))
    assert upstream.depth("orders") == 0
