"""Properties as bytes: what arrives is kept bit by bit, what we write others read, odd input never raises."""

import struct
from typing import Any

import pika.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import spec

from retry_scheduler.broker.properties import RawProperties, encode_properties, text_headers
from tests.raw_amqp import header, long_string, properties_with_headers

names = st.text(min_size=1).filter(lambda text: len(text.encode()) <= 255)
texts = st.text(max_size=300)
numbers = st.integers(min_value=-(2**63), max_value=2**63 - 1)
headers_to_send = st.dictionaries(names, texts | numbers, max_size=8)
short_texts = names

WANTED = header(b"wanted", b"S", long_string("värde".encode()))

# A value for each type that RabbitMQ knows, and what follows its tag.
FIELDS = {
    "boolean": (b"t", b"\x01"),
    "signed 8 bit": (b"b", b"\xff"),
    "unsigned 8 bit": (b"B", b"\xff"),
    "signed 16 bit": (b"s", b"\xff\xff"),
    "unsigned 16 bit": (b"u", b"\xff\xff"),
    "signed 32 bit": (b"I", b"\xff" * 4),
    "unsigned 32 bit": (b"i", b"\xff" * 4),
    "signed 64 bit": (b"l", b"\xff" * 8),
    "unsigned 64 bit": (b"L", b"\xff" * 8),
    "float": (b"f", struct.pack(">f", float("inf"))),
    "double": (b"d", struct.pack(">d", float("nan"))),
    "decimal": (b"D", b"\xff" * 5),
    "timestamp": (b"T", b"\xff" * 8),
    "no value": (b"V", b""),
    "text that is not UTF-8": (b"S", long_string(b"\xff\xfe")),
    "bytes": (b"x", long_string(bytes(range(256)))),
    "table": (b"F", long_string(header(b"wanted", b"S", long_string(b"inner")))),
    "array": (b"A", long_string(b"S" + long_string(b"x"))),
}


@given(st.binary(min_size=2))
def test_properties_come_and_go_as_the_same_bytes(raw: bytes) -> None:
    frame = pika.frame.Header(1, 12345, RawProperties(raw)).marshal()

    size, decoded = pika.frame.decode_frame(frame)

    assert size == len(frame)
    assert type(decoded.properties) is RawProperties
    assert decoded.properties.raw == raw
    assert decoded.body_size == 12345
    assert decoded.marshal() == frame


@given(headers_to_send, st.none() | short_texts, st.none() | short_texts)
def test_the_properties_that_we_write_are_read_by_pikas_own_decoder(
    headers: dict[str, str | int], message_id: str | None, content_type: str | None
) -> None:
    raw = encode_properties(headers, message_id=message_id, content_type=content_type)

    decoded: Any = spec.BasicProperties().decode(raw)

    assert decoded.headers == headers
    assert list(decoded.headers) == list(headers)
    assert (decoded.message_id, decoded.content_type, decoded.delivery_mode) == (message_id, content_type, 2)
    others = [
        decoded.content_encoding,
        decoded.priority,
        decoded.correlation_id,
        decoded.reply_to,
        decoded.expiration,
    ]
    assert others == [None] * 5


@given(headers_to_send, st.none() | short_texts, st.none() | short_texts)
def test_the_text_headers_that_we_write_are_found_again(
    headers: dict[str, str | int], message_id: str | None, content_type: str | None
) -> None:
    raw = encode_properties(headers, message_id=message_id, content_type=content_type)

    assert text_headers(raw, headers) == {
        name: text for name, text in headers.items() if isinstance(text, str)
    }


@pytest.mark.parametrize("what", ["a name", "message_id", "content_type"])
def test_a_short_string_above_255_bytes_is_refused(what: str) -> None:
    long = "é" * 128

    with pytest.raises(ValueError, match="255 bytes"):
        if what == "a name":
            encode_properties({long: "x"})
        else:
            encode_properties({}, **{what: long})


@given(st.binary())
def test_looking_for_headers_never_raises_whatever_the_bytes(raw: bytes) -> None:
    assert set(text_headers(raw, ("x-retry-id", "traceparent"))) <= {"x-retry-id", "traceparent"}


@given(headers_to_send, st.data())
def test_looking_for_headers_never_raises_on_properties_that_were_damaged(
    headers: dict[str, str | int], data: st.DataObject
) -> None:
    raw = bytearray(encode_properties({**headers, "x-retry-id": "1:0"}, message_id="m", content_type="c"))
    for _ in range(data.draw(st.integers(min_value=1, max_value=4))):
        raw[data.draw(st.integers(min_value=0, max_value=len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(min_value=0, max_value=len(raw)))

    text_headers(bytes(raw), ("x-retry-id",))
    text_headers(bytes(raw[:cut]), ("x-retry-id",))


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_a_header_is_found_behind_a_value_of_any_type(field: str) -> None:
    tag, value = FIELDS[field]

    raw = properties_with_headers(header(b"odd", tag, value), WANTED)

    assert text_headers(raw, ("wanted",)) == {"wanted": "värde"}


def test_what_stands_behind_an_unknown_type_tag_cannot_be_found_and_what_stands_before_can() -> None:
    odd = header(b"odd", b"Z", b"\0\0\0\1x")

    assert text_headers(properties_with_headers(odd, WANTED), ("wanted",)) == {}
    assert text_headers(properties_with_headers(WANTED, odd), ("wanted",)) == {"wanted": "värde"}


def test_a_header_of_another_type_is_not_taken_for_text() -> None:
    raw = properties_with_headers(
        header(b"wanted", b"I", b"\0\0\0\1"), header(b"wanted", b"x", long_string(b"y"))
    )

    assert text_headers(raw, ("wanted",)) == {}


def test_headers_are_found_behind_the_properties_that_come_before_them() -> None:
    table = WANTED
    flags = 1 << 15 | 1 << 14 | 1 << 13
    raw = struct.pack(">H", flags) + b"\x04text" + b"\x04gzip" + struct.pack(">I", len(table)) + table

    assert text_headers(raw, ("wanted",)) == {"wanted": "värde"}


def test_a_table_that_claims_to_be_longer_than_it_is_does_no_harm() -> None:
    raw = struct.pack(">HI", 1 << 13, 2**32 - 1) + WANTED

    assert text_headers(raw, ("wanted",)) == {"wanted": "värde"}
