"""Reads the body of a request: strict JSON with the fields of the contract, none of them given twice.

Pure: bytes in, fields with the right types out; what their values mean is up to `messages`. A fast decoder
reads every body. It takes the last one of keys given twice, and its refusals are for programmers; so

    read quickly: taken, and no key is given twice -> the fields
        `-> otherwise read carefully, field by field: what is wrong, or that it only looked odd
"""

import json
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from retry_scheduler.errors import MalformedRequest
from retry_scheduler.repeated_keys import UniqueKeys

# Reading carefully builds an object for each value: 5 s and 1 GB for 16 MiB of brackets, while the
# instance's heart stands still. This many take a quarter of a second. What has more gets the quick verdict.
CAREFUL_MAX_VALUES = 500_000
# The numbers of a Buffer, which cost a tenth: no fewer than 16 MiB can hold.
CAREFUL_MAX_NUMBERS = 10_000_000

_NOT_A_UUID = "must be a UUID in its 36-character form, such as 123e4567-e89b-12d3-a456-426614174000"


class NodeBuffer(msgspec.Struct, frozen=True):
    """How Node.js writes a Buffer with JSON.stringify."""

    type: Literal["Buffer"]
    data: list[Annotated[int, Meta(ge=0, le=255)]]


MessageId = Annotated[str, Meta(pattern=r"\A[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")]
RetryCount = Annotated[int, Meta(ge=0, le=2**31 - 1)]
MaxRetries = Annotated[int, Meta(ge=0, le=1000)]
RetryAfter = Annotated[int, Meta(ge=0)]


class RequestBody(msgspec.Struct):
    """The JSON object as the contract describes it. Fields it does not name are ignored."""

    message_id: MessageId
    original_payload: bytes | NodeBuffer
    original_queue: str
    error_reason: str | msgspec.UnsetType = msgspec.UNSET
    retry_count: RetryCount = 0
    max_retries: MaxRetries | msgspec.UnsetType = msgspec.UNSET
    retry_after_ms: RetryAfter | msgspec.UnsetType = msgspec.UNSET


class _PayloadOnly(msgspec.Struct):
    original_payload: msgspec.Raw


_decode = msgspec.json.Decoder(RequestBody).decode
_decode_payload = msgspec.json.Decoder(_PayloadOnly).decode
_FIELD_TYPES: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(RequestBody)}
_REQUIRED = tuple(field.name for field in msgspec.structs.fields(RequestBody) if field.required)
_BUFFER_NAMES = tuple(field.name for field in msgspec.structs.fields(NodeBuffer))
_NAMED_BY_DECODER = re.compile(r"(?:at `\$\.|required field `)(\w+)")
_UNIQUE_FIELDS = UniqueKeys(_FIELD_TYPES)
_UNIQUE_IN_BUFFER = UniqueKeys(_BUFFER_NAMES)

# Where the bulk of a body begins: what a text holds, or the array of a Buffer as Node.js writes it.
_PAYLOAD_KEY = b'"original_payload"'
_PAYLOAD_OPENS = re.compile(
    rb"""\s*+ : \s*+ (?: " | \{ \s*+ (?: "type" \s*+ : \s*+ "Buffer" \s*+ , \s*+ )?+ "data" \s*+ : \s*+ \[ )
    """,
    re.VERBOSE,
)

_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_SHORT_DIGITS = 30


def read_body(body: bytes) -> RequestBody:
    """Return the fields. Raises MalformedRequest, which names the first field that breaks a rule."""
    try:
        return read_quickly(body)
    except MalformedRequest:
        if not _has_few_values(body):
            raise
    return read_carefully(body)


def read_quickly(body: bytes) -> RequestBody:
    """Return the same fields as `read_carefully`, or raise MalformedRequest: perhaps without need.

    What it refuses although it keeps to the contract: half a surrogate pair in a text that may have one.
    """
    try:
        body.decode()  # the decoder skips over fields that it does not know without reading them
        decoded = _decode(body)
        _refuse_repeated(body, decoded)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        refusal = str(error)
        named = _NAMED_BY_DECODER.search(refusal)
        raise MalformedRequest(named[1] if named else "body", f"is not right: {refusal}") from None
    return decoded


def _refuse_repeated(body: bytes, decoded: RequestBody) -> None:
    text = _without_payload(body)
    if _UNIQUE_FIELDS.may_repeat(text) and (name := _UNIQUE_FIELDS.repeated(text)):
        raise MalformedRequest(name, "is given twice")
    if type(decoded.original_payload) is not bytes and _UNIQUE_IN_BUFFER.may_repeat(text):
        buffer = bytes(_decode_payload(text).original_payload)
        if name := _UNIQUE_IN_BUFFER.repeated(buffer):
            raise MalformedRequest("original_payload", f"has {name} twice")


def _without_payload(body: bytes) -> bytes:
    """Return the body without its base64 or numbers: most of its bytes, and no key can stand in them."""
    kept: list[bytes] = []
    start = 0
    key_at = body.find(_PAYLOAD_KEY)
    while key_at >= 0:
        opens_at = key_at + len(_PAYLOAD_KEY)
        if (opening := _PAYLOAD_OPENS.match(body, opens_at)) is not None:
            opens_at = opening.end()
            if (closes_at := _end_of_payload(body, opens_at)) >= 0:
                kept.append(body[start:opens_at])
                start = opens_at = closes_at
        key_at = body.find(_PAYLOAD_KEY, opens_at)
    kept.append(body[start:])
    return b"".join(kept)


def _end_of_payload(body: bytes, opens_at: int) -> int:
    """Return where the text or array ends whose content begins at `opens_at`; -1 if it is no plain one."""
    quote_at = body.find(b'"', opens_at)
    if body[opens_at - 1] == ord('"'):
        return -1 if body[quote_at - 1] == ord("\\") else quote_at  # base64 ends with no escape
    # Not beyond a quote, or a body of nothing but openings would take for ever.
    closes_at = body.find(b"]", opens_at, quote_at if quote_at >= 0 else len(body))
    return -1 if body.find(b"[", opens_at, closes_at) >= 0 else closes_at


def _has_few_values(body: bytes) -> bool:
    """Tell whether reading carefully takes a bounded time."""
    rest = _without_payload(body)
    values = rest.count(b",") + rest.count(b"[") + rest.count(b"{")
    return values <= CAREFUL_MAX_VALUES and body.count(b",") <= CAREFUL_MAX_NUMBERS


def read_carefully(body: bytes) -> RequestBody:
    """Return the same as `read_body`, however long it takes: field by field."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequest("body", f"is not UTF-8 (byte {error.start})") from None
    # For each number of a Buffer a function of ours would be called: only where it is needed.
    has_long_numbers = b"0" * (_SHORT_DIGITS + 1) in body.translate(_ZEROS)
    try:
        fields = json.loads(
            text,
            object_pairs_hook=_Pairs,
            parse_constant=_refuse_constant,
            parse_int=_shortened_integer if has_long_numbers else None,
        )
    except json.JSONDecodeError as error:
        problem = "is empty" if not body.strip() else f"is not JSON: {error.msg} (character {error.pos})"
        raise MalformedRequest("body", problem) from None
    except RecursionError:
        raise MalformedRequest("body", "is nested too deeply") from None
    except ValueError as error:
        raise MalformedRequest("body", f"is not JSON: {error}") from None
    if not isinstance(fields, _Pairs):
        raise MalformedRequest("body", "must be a JSON object")
    values: dict[str, Any] = {}
    for name, value in fields.pairs:
        if name not in _FIELD_TYPES:
            continue
        if name in values:
            raise MalformedRequest(name, "is given twice")
        values[name] = _checked_value(name, value)
    for name in _REQUIRED:
        if name not in values:
            raise MalformedRequest(name, "is missing")
    return RequestBody(**values)


def _checked_value(name: str, value: Any) -> Any:
    if name == "original_payload" and isinstance(value, _Pairs):
        value = _Pairs([(key, item) for key, item in value.pairs if key in _BUFFER_NAMES])
        keys = [key for key, _ in value.pairs]
        for key in _BUFFER_NAMES:
            if keys.count(key) > 1:
                raise MalformedRequest(name, f"has {key} twice")
    try:
        return msgspec.convert(_plain(value), _FIELD_TYPES[name])
    except msgspec.ValidationError as error:
        wrong_text = name == "message_id" and isinstance(value, str)
        raise MalformedRequest(name, _NOT_A_UUID if wrong_text else str(error)) from None
    except UnicodeEncodeError:
        raise MalformedRequest(name, "is not valid Unicode") from None
    except RecursionError:
        raise MalformedRequest(name, "is nested too deeply") from None


class _Pairs:
    """A JSON object with its keys as written, repeated ones included."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _plain(value: Any) -> Any:
    return {key: _plain(item) for key, item in value.pairs} if isinstance(value, _Pairs) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _shortened_integer(digits: str) -> int:
    # int() is quadratic and refuses more than 4,300 digits. Thirty are far outside every bound too.
    return int(digits[:_SHORT_DIGITS])
