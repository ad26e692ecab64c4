"""Requests of every shape, read quickly and slowly: the same ones are taken, with every field and byte."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from retry_scheduler.errors import MalformedRequest
from retry_scheduler.messages import parse_request, storable_text
from retry_scheduler.repeated_keys import UniqueKeys
from retry_scheduler.request_body import RequestBody, read_carefully, read_quickly
from tests.factories import encoded, node_buffer
from tests.slow_requests import DEFAULT_MAX_RETRIES, FIELDS, HUGE, Pairs, read_slowly, storable_slowly
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE

many = settings(max_examples=1500, deadline=None)

# Surrogates too: JSON can write what UTF-8 cannot.
any_text = st.text(st.characters(), max_size=12)
tricky_text = st.sampled_from(
    [*FIELDS, '"original_payload": "', '"retry_count":', "\\", '"', "\\u0022", "type", "data", "Buffer", ""]
)
names = any_text | tricky_text
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)

tricky_fields = st.tuples(names.filter(lambda name: name not in FIELDS), json_values)
# Which characters are escaped: none, each one, or every second or third.
sometimes = st.sampled_from([0, 0, 0, 1, 2, 3])
spaces = st.sampled_from(["", " ", "\n\t"])

uuids = st.uuids().flatmap(lambda uuid: st.sampled_from([str(uuid), str(uuid).upper()]))
# Their keys in any number: once, twice, not at all.
buffers_as_written = st.lists(
    st.tuples(st.just("type"), st.just("Buffer"))
    | st.tuples(st.just("data"), st.lists(st.integers(0, 255), max_size=3))
    | st.tuples(names, json_values),
    max_size=4,
).map(Pairs)
payloads = (
    st.binary(max_size=40).flatmap(lambda payload: st.sampled_from([encoded(payload), node_buffer(payload)]))
    | buffers_as_written
)
long_texts = st.text(st.sampled_from("aé🐇\0\ud800"), min_size=1, max_size=5).map(
    lambda some: some * (9000 // len(some))
)
large_payloads = st.binary(min_size=1, max_size=8).flatmap(
    lambda some: st.sampled_from(
        [encoded(some * (1_500_000 // len(some))), node_buffer(some * (100_000 // len(some)))]
    )
)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "message_id": uuids,
    "original_payload": payloads,
    "original_queue": st.text(min_size=1, max_size=60) | st.sampled_from(["orders", "é" * 127, "q" * 255]),
    "error_reason": any_text | long_texts,
    "retry_count": st.integers(min_value=0, max_value=2**31 - 1),
    "max_retries": st.integers(min_value=0, max_value=1000),
    "retry_after_ms": st.integers(min_value=0) | st.integers(min_value=0, max_value=10**40),
}
NEARLY_GOOD: dict[str, st.SearchStrategy[Any]] = {
    "message_id": st.text(st.sampled_from("0aF-{}\n"), min_size=34, max_size=38),
    "original_payload": st.text(st.sampled_from("aZ09+/=-_ \n"), max_size=12)
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["Buffer", "buffer", 1])},
        optional={
            "data": st.lists(st.integers(-1, 256) | scalars, max_size=3) | json_values,
            "length": json_values,
        },
    ),
    "original_queue": st.sampled_from(
        ["", "amq.x", "amq", RETRY_QUEUE, REVIEW_QUEUE, "\0", "a\ud800", "é" * 128, "q" * 256]
    ),
    "error_reason": json_values,
    "retry_count": st.sampled_from([-1, 2**31, 1.0, True, "1", 2**64]),
    "max_retries": st.sampled_from([-1, 1001, 0.0, False, None]),
    "retry_after_ms": st.sampled_from([-1, 1.5, True, "", []]),
}


@st.composite
def requests(
    draw: st.DrawFn,
    payloads: st.SearchStrategy[Any] = payloads,
    others: st.SearchStrategy[tuple[str, Any]] = tricky_fields,
    escapes: st.SearchStrategy[int] = sometimes,
) -> bytes:
    """A JSON object with the contract's fields: mostly right, in any order, written in any way.

    others: fields that the contract does not name. escapes: 0 for none, n for every n-th character.
    """
    pairs: list[tuple[str, Any]] = []
    wrong = draw(st.sets(st.sampled_from(FIELDS), max_size=2)) if draw(st.booleans()) else set()
    for name in FIELDS:
        if name in wrong:
            pairs += [(name, draw(NEARLY_GOOD[name] | json_values))] * draw(st.integers(0, 2))
        elif name in FIELDS[:3] or draw(st.booleans()):
            pairs.append((name, draw(payloads if name == "original_payload" else GOOD[name])))
    pairs += draw(st.lists(others, max_size=3))
    written = _Writer(draw(spaces), escape=draw(escapes))
    body = "{" + ",".join(written.pair(*pair) for pair in draw(st.permutations(pairs))) + "}"
    return body.encode()


class _Writer:
    """Writes JSON as it may be written: with spaces and escapes where nobody needs them."""

    def __init__(self, space: str, *, escape: int) -> None:
        self._space = space
        self._escape = escape

    def pair(self, name: str, value: Any) -> str:
        return f"{self._space}{self.text(name)}{self._space}:{self._space}{self.value(value)}{self._space}"

    def value(self, value: Any) -> str:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict | Pairs):
            pairs = value.items() if isinstance(value, dict) else value
            return "{" + ",".join(self.pair(*pair) for pair in pairs) + "}"
        if isinstance(value, list):
            return "[" + ",".join(self.value(item) for item in value) + "]"
        return json.dumps(value)

    def text(self, text: str) -> str:
        if self._escape:
            return '"' + "".join(self._character(*place) for place in enumerate(text)) + '"'
        return _plain_text(text)

    def _character(self, place: int, character: str) -> str:
        if place % self._escape:
            return _plain_text(character)[1:-1]
        units = character.encode("utf-16-be", errors="surrogatepass")
        return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def _plain_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(text)
    return json.dumps(text, ensure_ascii=False)


def compare(body: bytes) -> None:
    """Read `body` both ways and make sure that nothing but a refusal is raised."""
    slowly = read_slowly(body)
    try:
        request = parse_request(
            body, own_queues={RETRY_QUEUE, REVIEW_QUEUE}, default_max_retries=DEFAULT_MAX_RETRIES
        )
    except MalformedRequest as refusal:
        assert refusal.field in slowly.wrong
        return
    assert not slowly.wrong
    if request.retry_after_ms is not None:
        request.retry_after_ms = min(request.retry_after_ms, HUGE)
    assert {name: getattr(request, name) for name in slowly.values} == slowly.values


@many
@given(requests())
def test_any_object_is_taken_or_refused_as_the_contract_says_with_every_field_and_byte(body: bytes) -> None:
    compare(body)


@many
@given(requests(), st.data())
def test_damaged_requests_are_taken_only_if_the_damage_makes_another_request(
    body: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(min_value=1, max_value=3))):
        at = data.draw(st.integers(min_value=0, max_value=len(damaged) - 1))
        width = data.draw(st.integers(min_value=0, max_value=2))
        damaged[at : at + width] = data.draw(st.sampled_from([b"", *_PIECES]) | st.binary(max_size=2))
        if not damaged:
            break
    compare(bytes(damaged))


_PIECES = [bytes((byte,)) for byte in b'"\\{}[]:,.-+0e\x00\x1f\x7f\xc3\xa9\xed\xff \n'] + [
    b"\\u", b"\\ud83d", b"null", b"true", b'"retry_count":', b'"original_payload":"', b"\xef\xbb\xbf",
]  # fmt: skip


@many
@given(st.binary(max_size=60))
@example(b"")
def test_any_bytes_are_read_without_another_error(body: bytes) -> None:
    compare(body)


@many
@given(st.lists(st.tuples(st.sampled_from(FIELDS) | names, json_values)).map(Pairs), sometimes, spaces)
def test_a_name_that_is_a_key_twice_is_found_in_any_object(pairs: Pairs, escape: int, space: str) -> None:
    text = _Writer(space, escape=escape).value(pairs).encode()
    keys = [key for key, _ in pairs]
    twice = {name for name in FIELDS if keys.count(name) > 1}
    unique = UniqueKeys(FIELDS)

    repeated = unique.repeated(text)

    assert repeated in twice if twice else repeated is None
    assert repeated is None or unique.may_repeat(text)


@many
@given(requests())
def test_what_is_read_quickly_is_what_is_read_carefully(body: bytes) -> None:
    quickly, carefully = _read(read_quickly, body), _read(read_carefully, body)

    if quickly is not None or b"\\ud" not in body.lower():
        assert quickly == carefully


def _read(read: Callable[[bytes], RequestBody], body: bytes) -> RequestBody | None:
    try:
        fields = read(body)
    except MalformedRequest:
        return None
    if isinstance(fields.retry_after_ms, int):
        fields.retry_after_ms = min(fields.retry_after_ms, HUGE)
    return fields


@settings(max_examples=40, deadline=None)
@given(requests(large_payloads, escapes=st.just(0)))
def test_beside_a_large_payload_the_same_is_taken(body: bytes) -> None:
    compare(body)


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(), max_size=40), st.integers(min_value=0, max_value=80))
def test_storable_text_is_what_the_slow_way_gives_and_storing_it_again_changes_nothing(
    text: str, most: int
) -> None:
    stored = storable_text(text, most)

    assert stored == storable_slowly(text, most)
    assert storable_text(stored, most) == stored
