"""The messages of the contract: reads a retry request, and knows an attempt on its way out.

Pure: bytes in, values out. Section 2 of the contract is `parse_request`; AMQP stays in `broker`.
"""

import json
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from retry_scheduler.errors import MalformedRequest

# Enough for any stack trace that a person reads; whole headers stay far below a frame (128 KiB).
ERROR_REASON_MAX_BYTES = 8 * 1024
QUEUE_NAME_MAX_BYTES = 255

# Checking field by field builds an object for everything in the body: 5 s and 1 GB for 16 MiB of
# brackets, while the instance's heart stands still. What is longer without its payload gets the fast
# decoder's verdict.
CAREFUL_MAX_BYTES = 1024 * 1024

_NOT_A_UUID = "must be a UUID in its 36-character form, such as 123e4567-e89b-12d3-a456-426614174000"

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class NodeBuffer(msgspec.Struct, frozen=True):
    """How Node.js writes a Buffer with JSON.stringify."""

    type: Literal["Buffer"]
    data: list[Annotated[int, Meta(ge=0, le=255)]]


MessageId = Annotated[str, Meta(pattern=r"\A[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")]
RetryCount = Annotated[int, Meta(ge=0, le=2**31 - 1)]
MaxRetries = Annotated[int, Meta(ge=0, le=1000)]
RetryAfter = Annotated[int, Meta(ge=0)]


class _Body(msgspec.Struct):
    """The JSON object as the contract describes it. Fields it does not name are ignored."""

    message_id: MessageId
    original_payload: bytes | NodeBuffer
    original_queue: str
    error_reason: str | msgspec.UnsetType = msgspec.UNSET
    retry_count: RetryCount = 0
    max_retries: MaxRetries | msgspec.UnsetType = msgspec.UNSET
    retry_after_ms: RetryAfter | msgspec.UnsetType = msgspec.UNSET


_decode_body = msgspec.json.Decoder(_Body).decode
_FIELD_TYPES: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(_Body)}
_REQUIRED = tuple(field.name for field in msgspec.structs.fields(_Body) if field.required)
_KEYS = {name: f'"{name}"'.encode() for name in _FIELD_TYPES}
_PAYLOAD_KEY = _KEYS["original_payload"]
_NAMED_BY_DECODER = re.compile(r"(?:at `\$\.|required field `)(\w+)")


class RetryRequest(msgspec.Struct):
    """One attempt that an upstream asks for, checked.

    message_id: canonical, in lower case. error_reason: at most ERROR_REASON_MAX_BYTES, no NUL.
    retry_after_ms: None unless the consumer says when. intake_id: which delivery brought it.
    """

    message_id: str
    payload: bytes
    original_queue: str
    error_reason: str | None
    retry_count: int
    max_retries: int
    retry_after_ms: int | None
    traceparent: str | None = None
    tracestate: str | None = None
    intake_id: int | None = None

    @property
    def attempt(self) -> tuple[str, int]:
        """What identifies an attempt: (message_id, retry_count)."""
        return self.message_id, self.retry_count


class ClaimedRetry(msgspec.Struct):
    """An attempt that is due and lent to this instance.

    claims: the fence; whoever settles the row must name it. claims_unsettled: claims in a row without
    an outcome, this one included. payload: None if it was too large to come along (payload_bytes tells),
    or an operator deleted it.
    late_s: seconds between its due time and the claim, by the database's clock. more: whether more was
    due than the same claim could lend.
    """

    id: int
    claims: int
    message_id: str
    original_queue: str
    error_reason: str | None
    retry_count: int
    max_retries: int
    publish_failures: int
    claims_unsettled: int
    traceparent: str | None
    tracestate: str | None
    payload: bytes | None
    payload_bytes: int
    late_s: float
    more: bool

    @property
    def retry_id(self) -> str:
        """The stable key of this attempt: the same on every duplicate, for consumers to deduplicate by."""
        return f"{self.message_id}:{self.retry_count}"


class ClaimedQuarantine(msgspec.Struct):
    """A malformed message on its way to manual review. received_at: ISO 8601, UTC."""

    id: int
    claims: int
    field: str
    reason: str
    raw_body: bytes
    received_at: str
    publish_failures: int
    claims_unsettled: int

    @property
    def retry_id(self) -> str:
        """A stable key, like an attempt's; malformed input has no message_id that could be trusted."""
        return f"quarantine:{self.id}"


def parse_request(body: bytes, *, own_queues: Collection[str], default_max_retries: int) -> RetryRequest:
    """Return the attempt that a message on the retry queue asks for.

    own_queues: queues that a retry may not be sent to, because this service reads or fills them.
    Raises MalformedRequest, which names the first field that breaks a rule; nothing else.
    """
    checked = _checked_body(body)
    payload = checked.original_payload
    reason = checked.error_reason
    return RetryRequest(
        message_id=checked.message_id.lower(),
        payload=payload if isinstance(payload, bytes) else bytes(payload.data),
        original_queue=_checked_queue(checked.original_queue, own_queues),
        error_reason=None if reason is msgspec.UNSET else storable_text(reason, ERROR_REASON_MAX_BYTES),
        retry_count=checked.retry_count,
        max_retries=default_max_retries if checked.max_retries is msgspec.UNSET else checked.max_retries,
        retry_after_ms=None if checked.retry_after_ms is msgspec.UNSET else checked.retry_after_ms,
    )


def storable_text(text: str, max_bytes: int) -> str:
    """Return `text` cut to `max_bytes` of UTF-8 between two characters, without what PostgreSQL refuses.

    NUL and lone surrogates become U+FFFD.
    """
    encoded = text.replace("\0", REPLACEMENT).encode("utf-8", errors="surrogatepass")
    if len(encoded) > max_bytes or not text.isascii():
        # Cutting inside a character leaves an incomplete one at the end, which "ignore" drops. A
        # surrogate is three whole bytes that "replace" would turn into three marks: do it first.
        clean = re.sub("[\ud800-\udfff]", REPLACEMENT, encoded.decode("utf-8", errors="surrogatepass"))
        return clean.encode()[:max_bytes].decode("utf-8", errors="ignore")
    return encoded.decode()


def _checked_queue(queue: str, own_queues: Collection[str]) -> str:
    try:
        length = len(queue.encode())
    except UnicodeEncodeError:
        raise MalformedRequest("original_queue", "is not valid Unicode") from None
    if not 1 <= length <= QUEUE_NAME_MAX_BYTES:
        raise MalformedRequest(
            "original_queue", f"must be 1 to {QUEUE_NAME_MAX_BYTES} bytes long, is {length}"
        )
    if "\0" in queue:
        raise MalformedRequest("original_queue", "must not hold a NUL character")
    if queue.startswith("amq."):
        raise MalformedRequest(
            "original_queue", "must not begin with amq., which the broker reserves for itself"
        )
    if queue in own_queues:
        raise MalformedRequest("original_queue", "is a queue of the retry service itself")
    return queue


def _checked_body(body: bytes) -> _Body:
    decoded: _Body | None = None
    refusal = ""
    try:
        body.decode()  # msgspec skips over fields that it does not know without reading them
        decoded = _decode_body(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        refusal = str(error)
    rest = _without_payload(body)
    repeated = [name for name, key in _KEYS.items() if rest.count(key) > 1]
    if decoded is not None and not repeated and b"\\u" not in rest:
        return decoded
    if len(rest) <= CAREFUL_MAX_BYTES:
        return _carefully_checked_body(body)
    if decoded is None:
        named = _NAMED_BY_DECODER.search(refusal)
        raise MalformedRequest(named[1] if named else "body", f"is not right: {refusal}")
    if repeated:
        raise MalformedRequest(repeated[0], "seems to be given twice")
    return decoded


def _without_payload(body: bytes) -> bytes:
    """Return the body without its base64: most of its bytes, and no key can stand in them."""
    kept = []
    start = 0
    while (key_at := body.find(_PAYLOAD_KEY, start)) >= 0:
        after_key = key_at + len(_PAYLOAD_KEY)
        opens_at = body.find(b'"', after_key)
        if opens_at < 0 or body[after_key:opens_at].strip() != b":":
            kept.append(body[start:after_key])
            start = after_key
            continue
        closes_at = body.find(b'"', opens_at + 1)  # base64 holds no quote, and nothing that needs one
        if closes_at < 0:
            break
        kept.append(body[start : opens_at + 1])
        start = closes_at
    return b"".join((*kept, body[start:]))


def _carefully_checked_body(body: bytes) -> _Body:
    """Find out field by field what is wrong, or that a body is right that only looks odd."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequest("body", f"is not UTF-8 (byte {error.start})") from None
    try:
        fields = json.loads(
            text, object_pairs_hook=_Pairs, parse_constant=_refuse_constant, parse_int=_parse_integer
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
        try:
            values[name] = msgspec.convert(_plain(value), _FIELD_TYPES[name])
        except msgspec.ValidationError as error:
            wrong_text = name == "message_id" and isinstance(value, str)
            raise MalformedRequest(name, _NOT_A_UUID if wrong_text else str(error)) from None
        except UnicodeEncodeError:
            raise MalformedRequest(name, "is not valid Unicode") from None
        except RecursionError:
            raise MalformedRequest(name, "is nested too deeply") from None
    for name in _REQUIRED:
        if name not in values:
            raise MalformedRequest(name, "is missing")
    return _Body(**values)


class _Pairs:
    """A JSON object with its keys as written, repeated ones included."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _plain(value: Any) -> Any:
    return {key: _plain(item) for key, item in value.pairs} if isinstance(value, _Pairs) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _parse_integer(digits: str) -> int:
    # int() is quadratic and refuses more than 4,300 digits. Thirty are far outside every bound too.
    return int(digits[:30])
