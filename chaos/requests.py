"""What an upstream sends: a mix of good, odd, repeated, exhausted and malformed requests, from one seed.

Pure but for the dice it is given. Everything that is malformed carries a mark of its own, so that each can
be found again in quarantine and in manual review.
"""

import base64
import hashlib
import json
import math
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

QUEUES = ("chaos.orders", "chaos.invoices", "chaos.mails")
MISSING_QUEUE = "chaos.nobody-is-here"
# The one of QUEUES that refuses everything at times.
FULL_QUEUE = QUEUES[0]

RETRY_QUEUE = "retry.scheduled"
REVIEW_QUEUE = "manual-review.pending"

# Stands at the beginning of each payload, so that a payload in a log can be recognised.
PAYLOAD_MARK = b"chaos payload that nobody may log: "

MAX_RETRIES = 3
LARGEST_BYTES = 256 * 1024
# Larger ones are kept out of the repeats, so that these cost no memory to speak of.
REPEATABLE_BYTES = 32 * 1024
REPEATABLE = 500

# Requests in step fall due at the same moment: what a service does with one it must do with forty at once.
STEP_S = 1.5

# How often each kind is sent, in parts of the whole.
MIX: Mapping[str, float] = {
    "valid": 0.62,
    "in step": 0.24,
    "repeat": 0.05,
    "exhausted": 0.02,
    "unroutable": 0.02,
    "twins": 0.02,
    "malformed": 0.03,
}


@dataclass(frozen=True)
class Request:
    """One message for the retry queue.

    payload_sha256: of the decoded payload; None if malformed. least_delay_ms: asked for by the request
    itself; None leaves it to the service's backoff.
    """

    kind: str
    body: bytes = field(repr=False)
    message_id: str | None = None
    retry_count: int | None = None
    max_retries: int | None = None
    queue: str | None = None
    payload_sha256: str | None = None
    least_delay_ms: int | None = None

    @property
    def described(self) -> dict[str, Any]:
        """What the operation log keeps of it: everything but the bytes."""
        return {
            "kind": self.kind,
            "message_id": self.message_id,
            "retry_count": self.retry_count,
            "max_retries": self.max_retries,
            "queue": self.queue,
            "payload_sha256": self.payload_sha256,
            "body_sha256": sha256(self.body),
            "body_bytes": len(self.body),
            "least_delay_ms": self.least_delay_ms,
        }


def sha256(content: bytes) -> str:
    """Return the digest as text."""
    return hashlib.sha256(content).hexdigest()


def make_request(
    kind: str,
    *,
    message_id: str,
    payload: bytes,
    queue: str,
    retry_count: int = 0,
    max_retries: int = MAX_RETRIES,
    retry_after_ms: int | None = None,
    error_reason: str = "the chaos test says so",
) -> Request:
    """Return a request that keeps to the contract."""
    fields: dict[str, Any] = {
        "message_id": message_id,
        "original_payload": base64.b64encode(payload).decode(),
        "original_queue": queue,
        "error_reason": error_reason,
        "retry_count": retry_count,
        "max_retries": max_retries,
    }
    if retry_after_ms is not None:
        fields["retry_after_ms"] = retry_after_ms
    return Request(
        kind,
        json.dumps(fields).encode(),
        message_id,
        retry_count,
        max_retries,
        queue,
        sha256(payload),
        retry_after_ms,
    )


class RequestMix:
    """An endless supply. mix: parts of the whole for each kind, as in MIX."""

    def __init__(self, dice: random.Random, mix: Mapping[str, float] = MIX) -> None:
        self._dice = dice
        self._kinds = list(mix)
        self._weights = list(mix.values())
        self._sent: deque[Request] = deque(maxlen=REPEATABLE)

    def next(self) -> list[Request]:
        """Return what to send next: one request, or two that belong together."""
        (kind,) = self._dice.choices(self._kinds, self._weights)
        if kind == "repeat" and self._sent:
            return [replace(self._dice.choice(self._sent), kind="repeat")]
        if kind == "twins":
            return self._twins()
        if kind == "malformed":
            return [self._malformed()]
        request = self._well_formed(kind)
        if len(request.body) <= REPEATABLE_BYTES and kind != "unroutable":
            self._sent.append(request)
        return [request]

    def _well_formed(self, kind: str) -> Request:
        return make_request(
            kind,
            message_id=self._new_id(),
            payload=self._payload(),
            queue=MISSING_QUEUE if kind == "unroutable" else self._dice.choice(QUEUES),
            retry_count=MAX_RETRIES + self._dice.randrange(2) if kind == "exhausted" else 0,
            retry_after_ms=_until_step_ms() if kind in ("in step", "unroutable") else None,
        )

    def _twins(self) -> list[Request]:
        """Two attempts of one message that fall due together, one of them for a queue that is not there."""
        message_id, payload = self._new_id(), self._payload()
        return [
            make_request(
                "twins",
                message_id=message_id,
                payload=payload,
                queue=queue,
                retry_count=retry_count,
                retry_after_ms=_until_step_ms(),
            )
            for retry_count, queue in enumerate((MISSING_QUEUE, self._dice.choice(QUEUES)))
        ]

    def _malformed(self) -> Request:
        good = self._well_formed("valid")
        return Request("malformed", self._dice.choice(SPOILERS)(good.body, self._new_id().encode()))

    def _new_id(self) -> str:
        return str(UUID(int=self._dice.getrandbits(128), version=4))

    def _payload(self) -> bytes:
        size = int(math.exp(self._dice.uniform(0, math.log(LARGEST_BYTES)))) - 1
        return (PAYLOAD_MARK + self._dice.randbytes(size))[:size]


def _until_step_ms() -> int:
    """Milliseconds until the next moment at which requests in step are due, at least a third of a second."""
    ahead_s = STEP_S - time.time() % STEP_S
    return int((ahead_s if ahead_s > 1 / 3 else ahead_s + STEP_S) * 1000)


def _spoil_field(name: str, literal: bytes) -> Callable[[bytes, bytes], bytes]:
    def spoil(body: bytes, mark: bytes) -> bytes:
        value = json.dumps(json.loads(body)[name]).encode()
        opening = json.dumps(name).encode() + b": "
        return body.replace(opening + value, opening + literal.replace(b"MARK", mark), 1)

    return spoil


# Each takes the body of a good request and a mark that no other message carries, and breaks one rule.
SPOILERS: tuple[Callable[[bytes, bytes], bytes], ...] = (
    lambda body, mark: b"orders failed, please retry " + mark,
    lambda body, mark: b'["' + mark + b'"]',
    lambda body, mark: body[:-20],
    lambda body, mark: b"\xff" + body,
    lambda body, mark: body[:-1] + b', "retry_count": 1}',
    _spoil_field("message_id", b'"no UUID MARK"'),
    # Not strictly base64; a lenient decoder makes "hello" of it.
    _spoil_field("original_payload", b'"aGVs!!bG8="'),
    _spoil_field("original_payload", b'{"type": "Buffer", "data": [256]}'),
    _spoil_field("original_queue", b'"amq.MARK"'),
    _spoil_field("retry_count", b"true"),
    _spoil_field("retry_count", b"-1"),
    _spoil_field("max_retries", b"1e400"),
)
