"""docs/contract.md, rule by rule: what a request may hold, and how a refusal names what is wrong."""

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retry_scheduler import request_body
from retry_scheduler.errors import MalformedRequest
from retry_scheduler.messages import ERROR_REASON_MAX_BYTES, RetryRequest, parse_request, storable_text
from retry_scheduler.request_body import read_body, read_carefully
from tests.factories import (
    MISSING,
    PAYLOAD,
    encoded,
    make_raw_request,
    make_request,
    node_buffer,
    request_fields,
)
from tests.malformed import MALFORMED, TWO_MISTAKES, Malformed
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE

ALL_BYTES = bytes(range(256))
LARGE_PAYLOAD = encoded(bytes(2 * 1024 * 1024)).encode()

# Each makes a request of more than 1 MiB.
LARGE: dict[str, dict[str, Any]] = {
    "base64": {"original_payload": LARGE_PAYLOAD.decode()},
    "Buffer": {"original_payload": node_buffer(ALL_BYTES * 1600)},
    "text": {"error_reason": "stack\n" * 400_000},
    "values": {"rows": [0] * 600_000},
}
# Names that mean something elsewhere.
INNER: dict[str, Any] = {
    "value": "message_id",
    "": ["message_id", "retry_count"],
    "original": {"message_id": "x", "original_payload": {"data": [{"retry_count": 1}], "type": 1}},
    "headers": [{"retry_count": 5}, {"retry_count": 6, "type": "Buffer", "data": []}],
    "note": 'caf\u00e9 "retry_count": 7, \\"message_id": ',
}

# Surrogates too: JSON can write what UTF-8 cannot.
any_text = st.text(st.characters(), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=8,
)


def parse(body: bytes) -> RetryRequest:
    return parse_request(body, own_queues={RETRY_QUEUE, REVIEW_QUEUE}, default_max_retries=3)


def test_what_is_ignored_may_be_nested_as_deep_as_the_contract_says() -> None:
    deep = make_request()[:-1] + b', "x": ' + b"[" * 899 + b"]" * 899 + b"}"

    assert parse(deep) == parse(make_request(message_id=parse(deep).message_id))


@pytest.mark.parametrize("malformed", MALFORMED, ids=lambda malformed: malformed.what)
def test_a_request_that_breaks_a_rule_is_refused_by_the_name_of_the_field(malformed: Malformed) -> None:
    with pytest.raises(MalformedRequest) as refusal:
        parse(malformed.body)

    assert refusal.value.field == malformed.field
    assert str(refusal.value).startswith(f"{malformed.field}: ")
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(
    "malformed",
    [malformed for malformed in MALFORMED if encoded(PAYLOAD).encode() in malformed.body],
    ids=lambda malformed: malformed.what,
)
def test_a_large_payload_changes_nothing_in_what_is_refused_and_why(malformed: Malformed) -> None:
    body = malformed.body.replace(encoded(PAYLOAD).encode(), LARGE_PAYLOAD)

    with pytest.raises(MalformedRequest) as refusal:
        parse(body)

    assert refusal.value.field == malformed.field
    assert len(str(refusal.value)) < 1000


def test_of_two_mistakes_the_first_one_is_named() -> None:
    with pytest.raises(MalformedRequest) as refusal:
        parse(TWO_MISTAKES)

    assert refusal.value.field == "retry_count"


@pytest.mark.parametrize("field", ["message_id", "original_payload", "original_queue"])
def test_a_required_field_that_is_missing_is_called_missing(field: str) -> None:
    with pytest.raises(MalformedRequest, match=f"^{field}: is missing$"):
        parse(make_request(**{field: MISSING}))


def test_a_request_in_upper_and_lower_case_names_the_same_message() -> None:
    message_id = "3F2B8A54-9C1D-4E7A-8B55-0A6F2C9D1E77"

    request = parse(make_request(message_id=message_id, retry_count=2))

    assert request.message_id == message_id.lower()
    assert request.attempt == parse(make_request(message_id=message_id.lower(), retry_count=2)).attempt


def test_the_nil_uuid_is_a_uuid() -> None:
    assert parse(make_request(message_id="00000000-0000-0000-0000-000000000000")).message_id.startswith(
        "0000"
    )


@pytest.mark.parametrize("payload", [b"", b"\0", b"h", b"hi", b"hi!", ALL_BYTES, ALL_BYTES * 1000])
@pytest.mark.parametrize("form", [encoded, node_buffer], ids=["base64", "Buffer"])
def test_a_payload_arrives_as_the_bytes_it_was_in_either_form(payload: bytes, form: Any) -> None:
    assert parse(make_request(original_payload=form(payload))).payload == payload


def test_a_buffer_may_have_more_fields_and_in_any_order() -> None:
    buffer = {
        "data": [104, 105],
        "length": 2,
        "parent": {"type": "ArrayBuffer", "data": [], "data ": []},
        "type": "Buffer",
    }

    assert parse(make_request(original_payload=buffer)).payload == b"hi"


@pytest.mark.parametrize(
    "queue",
    [
        "o",
        "q" * 255,
        "é" * 127 + "q",
        "amq",
        "AMQ.orders",
        "orders/../bills",
        "'; DROP TABLE retry_queue; --",
        '"quoted" \\ back',
        "línea\nnueva",
        "日本 🐇",
        "retry.scheduled.v2",
    ],
)
def test_a_queue_name_of_1_to_255_bytes_is_taken_as_it_is(queue: str) -> None:
    assert parse(make_request(original_queue=queue)).original_queue == queue


def test_a_queue_that_the_settings_call_their_own_is_refused() -> None:
    body = make_request(original_queue="my.retries")

    with pytest.raises(MalformedRequest, match=r"^original_queue: .*itself"):
        parse_request(body, own_queues=["my.retries"], default_max_retries=3)


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("", ""),
        ("plain", "plain"),
        ("a" * 8192, "a" * 8192),
        ("a" * 8193, "a" * 8192),
        ("a" + "é" * 4096, "a" + "é" * 4095),
        ("aa" + "🐇" * 2048, "aa" + "🐇" * 2047),
        ("a\0b", "a\N{REPLACEMENT CHARACTER}b"),
        ("half \ud83d an emoji", "half \N{REPLACEMENT CHARACTER} an emoji"),
        ("\udc07\ud83d", "\N{REPLACEMENT CHARACTER}" * 2),
        ("\ud83d\udc07", "🐇"),
        ("\x1b[31mred\x1b[0m\r\n\u202e", "\x1b[31mred\x1b[0m\r\n\u202e"),
    ],
)
def test_an_error_reason_is_cut_to_8_kib_between_characters_and_made_storable(text: str, stored: str) -> None:
    assert parse(make_request(error_reason=text)).error_reason == stored


def test_an_error_reason_of_10_mib_is_cut_and_does_not_hide_the_rest() -> None:
    request = parse(make_request(error_reason="stack\n" * (10 * 1024 * 1024 // 6), retry_count=2))

    assert request.error_reason == ("stack\n" * 2000)[:ERROR_REASON_MAX_BYTES]
    assert request.retry_count == 2


@pytest.mark.parametrize("count", [0, 1, 2**31 - 1])
def test_a_retry_count_up_to_2147483647_is_taken(count: int) -> None:
    assert parse(make_request(retry_count=count)).retry_count == count


@pytest.mark.parametrize("retries", [0, 1, 1000])
def test_max_retries_from_0_to_1000_is_taken_as_told(retries: int) -> None:
    assert parse(make_request(max_retries=retries)).max_retries == retries


def test_what_is_not_told_takes_its_default() -> None:
    fewest = {
        name: MISSING
        for name in request_fields()
        if name not in ("message_id", "original_payload", "original_queue")
    }

    request = parse_request(make_request(**fewest), own_queues=(), default_max_retries=7)

    assert (request.retry_count, request.max_retries) == (0, 7)
    assert (request.error_reason, request.retry_after_ms) == (None, None)
    assert (request.traceparent, request.tracestate) == (None, None)


def test_a_wait_of_any_length_is_taken_and_a_wait_of_0_is_not_the_same_as_none() -> None:
    assert parse(make_request(retry_after_ms=0)).retry_after_ms == 0
    assert parse(make_request(retry_after_ms=90_000)).retry_after_ms == 90_000
    assert (parse(make_raw_request(retry_after_ms="1" + "0" * 30)).retry_after_ms or 0) >= 86_400_000
    assert (parse(make_raw_request(retry_after_ms="9" * 5000)).retry_after_ms or 0) >= 86_400_000


@pytest.mark.parametrize(
    "extra",
    [
        {"next_retry_at_ms": -1},
        {"next_retry_at_ms": 253402300800000},
        {"next_retry_at_ms": "tomorrow"},
        {"classification": {"transient": None}},
        {"payload": "not base64!", "retry-count": -1, "Retry_Count": "x", "": 0},
        {"inner": {"retry_count": 99, "message_id": "none", "retry\u0000": []}},
    ],
)
def test_fields_that_the_contract_does_not_name_change_nothing(extra: dict[str, Any]) -> None:
    fields = request_fields(retry_count=1)

    assert parse(json.dumps({**extra, **fields}).encode()) == parse(json.dumps(fields).encode())


@pytest.mark.parametrize("large", LARGE.values(), ids=LARGE)
def test_names_of_ours_inside_ignored_fields_are_ignored_beside_anything_large(large: dict[str, Any]) -> None:
    fields = request_fields(retry_count=1, **large)

    assert parse(json.dumps({**INNER, **fields}).encode()) == parse(json.dumps(fields).encode())
    assert parse(json.dumps({**fields, **INNER}).encode()) == parse(json.dumps(fields).encode())


@pytest.mark.parametrize("again", [b"retry_count", rb"retry\u005fcount"], ids=["plain", "escaped"])
@pytest.mark.parametrize("large", LARGE.values(), ids=LARGE)
def test_a_key_given_twice_is_found_beside_anything_large(large: dict[str, Any], again: bytes) -> None:
    body = json.dumps({**INNER, **request_fields(**large)}).encode()

    for twice in (b'{"%b": 0, %b' % (again, body[1:]), b'%b, "%b": 0}' % (body[:-1], again)):
        with pytest.raises(MalformedRequest, match=r"^retry_count: is given twice$"):
            parse(twice)


@pytest.mark.parametrize("again", [b"data", rb"d\u0061ta"], ids=["plain", "escaped"])
@pytest.mark.parametrize("large", [{}, LARGE["text"], LARGE["values"]], ids=["nothing", "text", "values"])
def test_data_given_twice_in_a_large_buffer_is_found_beside_anything_large(
    large: dict[str, Any], again: bytes
) -> None:
    fields = {**INNER, **request_fields(**large, **LARGE["Buffer"])}
    body = (
        json.dumps(fields).encode().replace(b'"type": "Buffer", ', b'"type": "Buffer", "%b": [1], ' % again)
    )

    with pytest.raises(MalformedRequest, match=r"^original_payload: has data twice$"):
        parse(body)


@pytest.mark.parametrize("large", [LARGE["base64"], LARGE["Buffer"], LARGE["text"]], ids=list(LARGE)[:3])
def test_half_an_emoji_in_an_error_reason_is_replaced_beside_anything_large(large: dict[str, Any]) -> None:
    fields = request_fields(**large)
    fields["error_reason"] = "\ud83d" + fields["error_reason"]

    request = parse(json.dumps(fields).encode())

    assert (request.error_reason or "").startswith("\N{REPLACEMENT CHARACTER}" + fields["error_reason"][1:6])


@pytest.mark.parametrize("form", [encoded, node_buffer], ids=["base64", "Buffer"])
@pytest.mark.parametrize(
    "text", ["ra\u010dun 日本 🐇", "tab\t, bell\7, delete\x7f", 'a " \\ / \\u0041', "\0"]
)
def test_escapes_in_texts_do_not_make_reading_slow(
    text: str, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = make_request(error_reason=text, original_payload=form(ALL_BYTES), note=text)
    expected = read_carefully(body)

    monkeypatch.setattr(request_body, "read_carefully", None)  # whoever needs it fails

    assert read_body(body) == expected
    assert read_body(body.replace(b"/", rb"\/")) == expected


def test_escapes_and_white_space_change_nothing() -> None:
    fields = request_fields(error_reason="no / disk", original_queue="bills")
    plain = json.dumps(fields)
    escaped = (
        plain.replace("retry_count", r"r\u0065try_count").replace("bills", r"b\u0069lls").replace("/", r"\/")
    )

    assert parse(escaped.encode()) == parse(plain.encode())
    assert parse(json.dumps(fields, indent=4).encode()) == parse(plain.encode())


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_and_nothing_else_is_raised(body: bytes) -> None:
    with pytest.raises(MalformedRequest):
        parse(body)


@given(st.dictionaries(st.sampled_from([*request_fields(), "retry_after_ms", "note"]), json_values))
def test_arbitrary_json_is_taken_or_refused_by_a_name_and_nothing_else_is_raised(
    fields: dict[str, Any],
) -> None:
    body = json.dumps(request_fields() | fields).encode()

    try:
        request = parse(body)
    except MalformedRequest as refusal:
        assert refusal.field in fields or refusal.field == "body"
    else:
        assert request.message_id == request.message_id.lower()
        assert 0 <= request.retry_count < 2**31
        assert 0 <= request.max_retries <= 1000
        assert len((request.error_reason or "").encode()) <= ERROR_REASON_MAX_BYTES
        assert 1 <= len(request.original_queue.encode()) <= 255


@given(st.text(alphabet=string.ascii_letters + string.digits + "+/=-_ \n", max_size=16))
def test_base64_is_taken_only_if_encoding_it_again_could_give_the_same_text(text: str) -> None:
    try:
        payload = parse(make_request(original_payload=text)).payload
    except MalformedRequest:
        return

    # Bits that the padding leaves over are the only thing that may differ.
    assert len(encoded(payload)) == len(text)
    assert encoded(payload).rstrip("=")[:-1] == text.rstrip("=")[:-1]


@given(st.text(), st.integers(min_value=3, max_value=64))
def test_storable_text_is_short_enough_and_a_beginning_of_the_text(text: str, most: int) -> None:
    expected = text.replace("\0", "\N{REPLACEMENT CHARACTER}")

    stored = storable_text(text, most)

    assert len(stored.encode()) <= most
    assert expected.startswith(stored)
    assert len(stored) == len(expected) or len((stored + expected[len(stored)]).encode()) > most


@given(st.lists(st.integers(min_value=0, max_value=0x10FFFF).map(chr)).map("".join))
def test_storable_text_never_raises_and_never_holds_what_postgresql_refuses(text: str) -> None:
    stored = storable_text(text, 64)

    assert "\0" not in stored
    stored.encode()
