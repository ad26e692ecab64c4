"""Requests for tests: a test names the fields that it is about, the rest is filled in here."""

import base64
import json
from typing import Any
from uuid import uuid4

# Recognisable, so that every test can look for it in the log, where no payload may be.
PAYLOAD = b"a payload that nobody may log \x00\xff"

MISSING = object()


def new_id() -> str:
    """Return a message id that no other message has."""
    return str(uuid4())


def encoded(payload: bytes) -> str:
    """Return a payload as it stands in a request."""
    return base64.b64encode(payload).decode()


def node_buffer(payload: bytes) -> dict[str, Any]:
    """Return a payload as Node.js writes a Buffer."""
    return {"type": "Buffer", "data": list(payload)}


def request_fields(**fields: Any) -> dict[str, Any]:
    """Return a request's fields: `fields`, and where they say nothing, good ones. MISSING leaves one out."""
    filled = {
        "message_id": new_id(),
        "original_payload": encoded(PAYLOAD),
        "original_queue": "orders",
        "error_reason": "connection refused",
        "retry_count": 0,
        "max_retries": 3,
        **fields,
    }
    return {name: value for name, value in filled.items() if value is not MISSING}


def make_request(**fields: Any) -> bytes:
    """Return a request's body: `request_fields` as JSON."""
    return json.dumps(request_fields(**fields)).encode()


def make_raw_request(**literals: str) -> bytes:
    """Return a request's body in which some values are written as given: what json.dumps cannot write."""
    fields = {name: json.dumps(value) for name, value in request_fields().items()} | literals
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()
