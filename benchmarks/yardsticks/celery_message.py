"""Celery's task messages (protocol 2), written without Celery.

So the upstream need not be installed with it, and costs less than with Celery's own `apply_async`:
what is measured is the worker.
"""

import json
from datetime import UTC, datetime, timedelta

from benchmarks.load import ORDERS, PAYLOAD_BASE64, Message
from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.broker.publication import RETRY_ID, Publication

QUEUE = "bench.celery"
TASK = "bench.redeliver"

_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def task(message: Message) -> Publication:
    """Return the task that redelivers `message` after its delay."""
    eta = datetime.now(UTC) + timedelta(milliseconds=message.delay_ms)
    headers: dict[str, str | int] = {
        "lang": "py",
        "task": TASK,
        "id": message.message_id,
        "root_id": message.message_id,
        "eta": eta.isoformat(),
        "retries": 0,
        "argsrepr": "(...)",
        "kwargsrepr": "{}",
        "origin": "bench",
        RETRY_ID: message.key,
    }
    arguments = [message.message_id, message.retry_count, ORDERS, PAYLOAD_BASE64]
    return Publication(
        QUEUE,
        key=message.key,
        properties=encode_properties(headers, content_type="application/json"),
        body=json.dumps([arguments, {}, _EMBED]).encode(),
    )
