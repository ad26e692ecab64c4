"""The rules of requests once more, slow and simple: what the service's own reading is compared with."""

import base64
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE

REQUIRED = ("message_id", "original_payload", "original_queue")
FIELDS = (*REQUIRED, "error_reason", "retry_count", "max_retries", "retry_after_ms")

UUID = re.compile("[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
BASE64 = re.compile("([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")

DEFAULT_MAX_RETRIES = 3
HUGE = 10**15  # milliseconds, far above what is granted


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written."""


class Read(NamedTuple):
    """A request: its values, or the names of what is wrong."""

    values: dict[str, Any]
    wrong: set[str]


def read_slowly(body: bytes) -> Read:
    """Read a request by the letter of the contract."""
    try:
        fields = json.loads(
            body.decode(), object_pairs_hook=Pairs, parse_constant=_refuse, parse_int=_integer
        )
    except (ValueError, RecursionError):
        return Read({}, {"body"})
    if not isinstance(fields, Pairs):
        return Read({}, {"body"})
    names = [name for name, _ in fields]
    wrong = {name for name in FIELDS if names.count(name) > 1} | {
        name for name in REQUIRED if name not in names
    }
    given = {name: value for name, value in fields if name in FIELDS}
    wrong |= {name for name, value in given.items() if not RULES[name](value)}
    return Read({} if wrong else _values(given), wrong)


def storable_slowly(text: str, most_bytes: int) -> str:
    """Replace what PostgreSQL refuses, and take characters while they fit."""
    stored, size = "", 0
    for character in text:
        unstorable = character == "\0" or "\ud800" <= character <= "\udfff"
        kept = "\N{REPLACEMENT CHARACTER}" if unstorable else character
        size += len(kept.encode())
        if size > most_bytes:
            break
        stored += kept
    return stored


def _values(given: dict[str, Any]) -> dict[str, Any]:
    payload, reason = given["original_payload"], given.get("error_reason")
    return {
        "message_id": given["message_id"].lower(),
        "payload": base64.b64decode(payload) if isinstance(payload, str) else bytes(dict(payload)["data"]),
        "original_queue": given["original_queue"],
        "error_reason": None if reason is None else storable_slowly(reason, 8192),
        "retry_count": given.get("retry_count", 0),
        "max_retries": given.get("max_retries", DEFAULT_MAX_RETRIES),
        "retry_after_ms": min(given["retry_after_ms"], HUGE) if "retry_after_ms" in given else None,
    }


def _is_payload(value: Any) -> bool:
    if isinstance(value, str):
        return BASE64.fullmatch(value) is not None
    if not isinstance(value, Pairs):
        return False
    fields = dict(value)
    data = fields.get("data")
    if [name for name, _ in value if name in ("type", "data")] not in (["type", "data"], ["data", "type"]):
        return False
    return fields.get("type") == "Buffer" and type(data) is list and all(_within(byte, 255) for byte in data)


def _is_queue(value: Any) -> bool:
    if not isinstance(value, str) or re.search("[\ud800-\udfff\0]", value):
        return False
    reserved = value.startswith("amq.") or value in (RETRY_QUEUE, REVIEW_QUEUE)
    return 1 <= len(value.encode()) <= 255 and not reserved


def _within(value: Any, most: float) -> bool:
    return type(value) is int and 0 <= value <= most


RULES: dict[str, Callable[[Any], bool]] = {
    "message_id": lambda value: isinstance(value, str) and UUID.fullmatch(value) is not None,
    "original_payload": _is_payload,
    "original_queue": _is_queue,
    "error_reason": lambda value: isinstance(value, str),
    "retry_count": lambda value: _within(value, 2**31 - 1),
    "max_retries": lambda value: _within(value, 1000),
    "retry_after_ms": lambda value: _within(value, float("inf")),
}


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _integer(digits: str) -> int:
    return int(digits[:4000])  # longer ones are refused by int(), and just as huge
