"""Requests that break one rule of the contract each, and the field that the refusal must name."""

import gzip
import json
from typing import Any, NamedTuple

from tests.factories import MISSING, make_raw_request, make_request, request_fields

ID = "3f2b8a54-9c1d-4e7a-8b55-0a6f2c9d1e77"


class Malformed(NamedTuple):
    """One request. what: a few words. field: whom the refusal must name."""

    what: str
    body: bytes
    field: str


def _wrong(what: str, **fields: Any) -> Malformed:
    (field,) = fields
    return Malformed(f"{field} {what}", make_request(**fields), field)


def _wrong_literal(what: str, **literals: str) -> Malformed:
    (field,) = literals
    return Malformed(f"{field} {what}", make_raw_request(**literals), field)


GOOD = make_request()

MESSAGE_IDS = [
    _wrong("missing", message_id=MISSING),
    _wrong("null", message_id=None),
    _wrong("a number", message_id=12345),
    _wrong("empty", message_id=""),
    _wrong("no UUID", message_id="order-4711"),
    _wrong("in braces", message_id="{" + ID + "}"),
    _wrong("as URN", message_id=f"urn:uuid:{ID}"),
    _wrong("without hyphens", message_id=ID.replace("-", "")),
    _wrong("with misplaced hyphens", message_id="3f2b8a5-49c1d-4e7a-8b55-0a6f2c9d1e77"),
    _wrong("with a newline behind", message_id=ID + "\n"),
    _wrong("with a space before", message_id=" " + ID),
    _wrong("of other digits", message_id=ID.replace("3", "\N{ARABIC-INDIC DIGIT THREE}")),
    _wrong("a list", message_id=[ID]),
    _wrong("with half an emoji", message_id="\ud83d" + ID[1:]),
]

PAYLOADS = [
    _wrong("missing", original_payload=MISSING),
    _wrong("null", original_payload=None),
    _wrong("a number", original_payload=5),
    _wrong("a list", original_payload=[104, 105]),
    _wrong("with characters that are not base64", original_payload="aGVs!!bG8="),
    _wrong("without padding", original_payload="aGVsbG8"),
    _wrong("with too much padding", original_payload="aGVsbG8=="),
    _wrong("of one character", original_payload="a"),
    _wrong("of padding alone", original_payload="===="),
    _wrong("of two texts in a row", original_payload="aGk=aGk="),
    _wrong("in the alphabet for URLs", original_payload="_-__"),
    _wrong("with a space", original_payload="aGVs bG8="),
    _wrong("with a newline inside", original_payload="aGVs\nbG8="),
    _wrong("with a newline behind", original_payload="aGVsbG8=\n"),
    _wrong("in letters outside ASCII", original_payload="äöüß"),
    _wrong("a Buffer with 256", original_payload={"type": "Buffer", "data": [256]}),
    _wrong("a Buffer with -1", original_payload={"type": "Buffer", "data": [-1]}),
    _wrong("a Buffer with 1.0", original_payload={"type": "Buffer", "data": [1.0]}),
    _wrong("a Buffer with true", original_payload={"type": "Buffer", "data": [True]}),
    _wrong("a Buffer with null", original_payload={"type": "Buffer", "data": [None]}),
    _wrong("a Buffer with text", original_payload={"type": "Buffer", "data": ["1"]}),
    _wrong("a Buffer of text", original_payload={"type": "Buffer", "data": "aGk="}),
    _wrong("a Buffer without data", original_payload={"type": "Buffer"}),
    _wrong("of another type", original_payload={"type": "Uint8Array", "data": [104]}),
    _wrong("of type buffer", original_payload={"type": "buffer", "data": [104]}),
    _wrong("without a type", original_payload={"data": [104]}),
    _wrong("an empty object", original_payload={}),
    _wrong("with half an emoji", original_payload="aGk\ud83d"),
    _wrong("of a type with half an emoji", original_payload={"type": "Buffer\ud83d", "data": []}),
]

QUEUES = [
    _wrong("missing", original_queue=MISSING),
    _wrong("null", original_queue=None),
    _wrong("a number", original_queue=7),
    _wrong("empty", original_queue=""),
    _wrong("of 256 bytes", original_queue="q" * 256),
    _wrong("of 128 characters of two bytes", original_queue="é" * 128),
    _wrong("of the broker's own", original_queue="amq.rabbitmq.reply-to"),
    _wrong("that this service reads", original_queue="retry.scheduled"),
    _wrong("that this service fills", original_queue="manual-review.pending"),
    _wrong("with NUL", original_queue="orders\0"),
    _wrong("with half an emoji", original_queue="orders \ud83d"),
]

ERROR_REASONS = [
    _wrong("null", error_reason=None),
    _wrong("a number", error_reason=404),
    _wrong("an object", error_reason={"code": 404}),
    _wrong_literal("an object 600 deep", error_reason='{"a": ' * 600 + "1" + "}" * 600),
]


def _wrong_counts(field: str, above: int) -> list[Malformed]:
    return [
        _wrong("true", **{field: True}),
        _wrong("null", **{field: None}),
        _wrong("text", **{field: "1"}),
        _wrong("half an emoji", **{field: "\ud83d"}),
        _wrong("1.5", **{field: 1.5}),
        _wrong("-1", **{field: -1}),
        _wrong("one too high", **{field: above}),
        _wrong_literal("1.0", **{field: "1.0"}),
        _wrong_literal("10^30", **{field: "1" + "0" * 30}),
        _wrong_literal("1e400", **{field: "1e400"}),
        _wrong_literal("of 5,000 digits", **{field: "9" * 5000}),
        _wrong_literal("of 5,000 digits below zero", **{field: "-" + "9" * 5000}),
    ]


COUNTS = [
    *_wrong_counts("retry_count", above=2**31),
    *_wrong_counts("max_retries", above=1001),
    _wrong("-1", retry_after_ms=-1),
    _wrong("true", retry_after_ms=True),
    _wrong("null", retry_after_ms=None),
    _wrong("text", retry_after_ms="500"),
    _wrong_literal("0.5", retry_after_ms="0.5"),
]

BODIES = [
    Malformed("an empty body", b"", "body"),
    Malformed("white space", b" \n", "body"),
    Malformed("no JSON", b"orders failed, please retry", "body"),
    Malformed("a list", b"[" + GOOD + b"]", "body"),
    Malformed("text", b'"retry"', "body"),
    Malformed("a number", b"42", "body"),
    Malformed("null", b"null", "body"),
    Malformed("a truncated object", GOOD[:-5], "body"),
    Malformed("two objects", GOOD + GOOD, "body"),
    Malformed("UTF-16", GOOD.decode().encode("utf-16"), "body"),
    Malformed("UTF-16 without a mark", GOOD.decode().encode("utf-16-le"), "body"),
    Malformed("a byte order mark", b"\xef\xbb\xbf" + GOOD, "body"),
    Malformed("gzip", gzip.compress(GOOD), "body"),
    Malformed("bytes that are not UTF-8", bytes(range(128, 256)), "body"),
    Malformed(
        "UTF-8 broken in a field that is ignored", make_request(note="x").replace(b'"x"', b'"\xff"'), "body"
    ),
    Malformed(
        "a surrogate written in UTF-8", make_request(note="x").replace(b'"x"', b'"\xed\xa0\x80"'), "body"
    ),
    Malformed("NaN", make_raw_request(retry_count="NaN"), "body"),
    Malformed("Infinity in a field that is ignored", make_raw_request(note="Infinity"), "body"),
    Malformed("a hundred thousand brackets", b"[" * 100_000, "body"),
    Malformed(
        "an ignored field of a hundred thousand brackets", GOOD[:-1] + b', "x": ' + b"[" * 100_000, "body"
    ),
    Malformed(
        "the same, and they are closed",
        GOOD[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "body",
    ),
]

# The last value would win in most parsers, the first in some: nobody knows which one was meant.
TWICE = [
    Malformed("retry_count twice", GOOD[:-1] + b', "retry_count": 1}', "retry_count"),
    Malformed("retry_count twice, the same", GOOD[:-1] + b', "retry_count": 0}', "retry_count"),
    Malformed("message_id twice", GOOD[:-1] + f', "message_id": "{ID}"}}'.encode(), "message_id"),
    Malformed("original_queue twice", b'{"original_queue": "bills", ' + GOOD[1:], "original_queue"),
    Malformed("retry_count again behind an escape", GOOD[:-1] + rb', "retry\u005fcount": 1}', "retry_count"),
    Malformed("message_id behind an escape again", rb'{"message_i\u0064": null, ' + GOOD[1:], "message_id"),
    _wrong_literal("a Buffer with data twice", original_payload='{"type":"Buffer","data":[1],"data":[2]}'),
    _wrong_literal(
        "a Buffer with type twice", original_payload='{"type":"Buffer","type":"Buffer","data":[]}'
    ),
    _wrong_literal(
        "a Buffer with data behind an escape again",
        original_payload=r'{"d\u0061ta":[1],"type":"Buffer","data":[1]}',
    ),
]

MALFORMED = [*MESSAGE_IDS, *PAYLOADS, *QUEUES, *ERROR_REASONS, *COUNTS, *BODIES, *TWICE]

# Two rules broken at once: the first field in the message is named.
TWO_MISTAKES = json.dumps(request_fields(retry_count=-1, max_retries=-1)).encode()
