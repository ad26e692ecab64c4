"""The messages of the contract: reads a retry request, and knows an attempt on its way out.

Pure: bytes in, values out. `parse_request` is "Asking for a retry" in docs/contract.md; JSON stays in
`request_body`, AMQP in `broker`.
"""

import re
from collections.abc import Collection

import msgspec

from retry_scheduler.errors import MalformedRequest
from retry_scheduler.request_body import read_body

# Enough for any stack trace that a person reads; whole headers stay far below a frame (128 KiB).
ERROR_REASON_MAX_BYTES = 8 * 1024
QUEUE_NAME_MAX_BYTES = 255

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


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
    checked = read_body(body)
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


def log_fields(attempt: RetryRequest | ClaimedRetry) -> dict[str, object]:
    """Return what every log line about an attempt says."""
    return {
        "message_id": attempt.message_id,
        "original_queue": attempt.original_queue,
        "retry_count": attempt.retry_count,
        "error_reason": attempt.error_reason,
    }


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
