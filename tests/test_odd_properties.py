"""Requests whose AMQP properties no client library could write or read: taken like any other.

A client that decodes them loses its connection, gets the same message again, and so on for ever
(pika/pika#1698). RabbitMQ itself turns away unknown type tags and doubles that are not numbers;
tests of `properties` cover those.
"""

import struct

import pytest

from tests.factories import PAYLOAD, make_request
from tests.raw_amqp import (
    RawPublisher,
    header,
    long_string,
    properties_with_headers,
    properties_with_message_id,
    properties_with_timestamp,
)
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

YEAR_50000 = 1_515_720_000_000
TRACE = header(b"traceparent", b"S", long_string(b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"))

TRACED = {
    "a header timestamp in the year 50000": header(b"when", b"T", struct.pack(">Q", YEAR_50000)),
    "a header timestamp before 1970": header(b"when", b"T", struct.pack(">q", -(10**10))),
    "the highest header timestamp": header(b"when", b"T", b"\xff" * 8),
    "a header name that is not UTF-8": header(b"\xff\xfe", b"S", long_string(b"x")),
    "a header value that is not UTF-8": header(b"x", b"S", long_string(b"\xff\xfe\x00")),
    "doubles": header(b"x", b"d", struct.pack(">d", 1e300)) + header(b"y", b"d", struct.pack(">d", 0.1)),
    "a float": header(b"x", b"f", struct.pack(">f", 0.1)),
    "a byte array": header(b"x", b"x", long_string(bytes(range(256)))),
    "no value": header(b"x", b"V", b""),
    "a decimal": header(b"x", b"D", b"\xff" + struct.pack(">I", 1)),
    "small numbers": header(b"b", b"b", b"\xff")
    + header(b"s", b"s", b"\xff\xff")
    + header(b"t", b"t", b"\x02"),
    "unsigned numbers": header(b"B", b"B", b"\xff")
    + header(b"u", b"u", b"\xff\xff")
    + header(b"i", b"i", b"\xff" * 4),
    "nested tables and arrays": header(
        b"x-death", b"A", long_string(b"F" + long_string(header(b"when", b"T", b"\x7f" * 8)))
    ),
    "100 KB of headers": b"".join(header(b"h%d" % n, b"S", long_string(b"v" * 90)) for n in range(1000)),
    "the same name twice": header(b"x", b"S", long_string(b"1")) + header(b"x", b"I", b"\0\0\0\1"),
    "an empty name": header(b"", b"S", long_string(b"")),
}

PLAIN = {
    "a timestamp in the year 50000": properties_with_timestamp(YEAR_50000),
    "a timestamp before 1970": properties_with_timestamp(-1),
    "the highest timestamp": properties_with_timestamp(2**63),
    "a message id that is not UTF-8": properties_with_message_id(b"\xff\xfe"),
    "no properties": struct.pack(">H", 0),
}


async def test_requests_with_odd_properties_are_taken_and_the_connection_is_kept(
    start_service: StartService, upstream: Upstream, table: Table, broker_url: str
) -> None:
    service = await start_service()
    upstream.declare("orders")

    with RawPublisher(broker_url) as publisher:
        for what, entries in TRACED.items():
            properties = properties_with_headers(entries, TRACE)
            publisher.publish(RETRY_QUEUE, properties, make_request(error_reason=what))
        for what, properties in PLAIN.items():
            publisher.publish(RETRY_QUEUE, properties, make_request(error_reason=what))
    messages = await upstream.receive("orders", len(TRACED) + len(PLAIN))
    await eventually(table.settled)

    assert all(message.body == PAYLOAD for message in messages)
    traced = {message.headers["x-original-error"] for message in messages if "traceparent" in message.headers}
    assert traced == set(TRACED)
    assert {message.headers["x-original-error"] for message in messages} == {*TRACED, *PLAIN}
    assert service.metrics().value("retry_reconnects_total") == 0
    assert service.metrics().value("retry_duplicates_total") == 0
    assert upstream.depth(RETRY_QUEUE) == 0


async def test_odd_properties_of_malformed_input_are_kept_bit_by_bit(
    start_service: StartService, upstream: Upstream, table: Table, broker_url: str
) -> None:
    service = await start_service()
    properties = properties_with_headers(*TRACED.values())

    with RawPublisher(broker_url) as publisher:
        publisher.publish(RETRY_QUEUE, properties, b"malformed")
    await upstream.receive(REVIEW_QUEUE, 1)

    assert await table.value("SELECT raw_properties FROM retry_quarantine") == properties
    assert service.metrics().value("retry_reconnects_total") == 0


@pytest.mark.parametrize(
    "entry", [header(b"traceparent", b"I", b"\0\0\0\1"), header(b"traceparent", b"S", long_string(b"a\0b"))]
)
async def test_trace_headers_that_cannot_be_carried_on_are_left_out(
    start_service: StartService, upstream: Upstream, broker_url: str, entry: bytes
) -> None:
    await start_service()
    upstream.declare("orders")

    with RawPublisher(broker_url) as publisher:
        publisher.publish(RETRY_QUEUE, properties_with_headers(entry), make_request())
    (message,) = await upstream.receive("orders", 1)

    assert "traceparent" not in message.headers
