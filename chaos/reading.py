"""Builds a history from what a trial has left: its operation log, the services' logs, and its ending."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from sys import intern
from typing import Any

from chaos.bed import SECRETS
from chaos.history import (
    Arrival,
    Enqueue,
    Event,
    Fault,
    History,
    InstanceEvent,
    Quarantined,
    Row,
    Sample,
)
from chaos.oplog import Entry, read_operations
from chaos.requests import PAYLOAD_MARK

ROWS = """SELECT message_id, retry_count, max_retries, status, last_error AS note,
       extract(epoch FROM created_at)::float8 AS created_at,
       extract(epoch FROM finished_at)::float8 AS finished_at FROM retry_queue"""
QUARANTINED = """SELECT id, encode(sha256, 'hex') AS sha256, delivered_at IS NOT NULL AS delivered
  FROM retry_quarantine"""

_ENQUEUED = (
    "kind",
    "message_id",
    "retry_count",
    "max_retries",
    "queue",
    "payload_sha256",
    "body_sha256",
    "least_delay_ms",
)


# What nobody may find in a log, on a page or in a command line.
CANARIES = {
    "a payload": PAYLOAD_MARK[:18],
    "a payload in base64": base64.b64encode(PAYLOAD_MARK[:18]),
    **{name: secret.encode() for name, secret in SECRETS.items()},
}

OPERATIONS = "operations.jsonl"
ENDING = "ending.json"


@dataclass(frozen=True)
class Ending:
    """How a trial ended: what stood in the tables, and what History says of itself under the same names."""

    rows: Sequence[Mapping[str, Any]]
    quarantined: Sequence[Mapping[str, Any]]
    healed_at: float
    quiet_at: float | None
    left: str
    backoff_ms: tuple[int, int]
    connections: int
    connections_most: int
    leaks: Sequence[str]

    def save(self, folder: Path) -> None:
        """Write it beside the logs."""
        (folder / ENDING).write_text(json.dumps(asdict(self)), encoding="utf-8")


def leaks_in(content: bytes, where: str) -> list[str]:
    """Return a sentence for each canary that stands in it."""
    return [f"{where} shows {name}" for name, canary in CANARIES.items() if canary in content]


def read_history(folder: Path) -> History:
    """Return the history of the trial that has left its logs and its ending in this folder."""
    ending = json.loads((folder / ENDING).read_text(encoding="utf-8"))
    operations = list(read_operations(folder / OPERATIONS))
    offset_s = operations[0]["wall"] - operations[0]["t"]
    by_f: dict[str, list[Entry]] = {}
    for entry in operations:
        by_f.setdefault(entry["f"], []).append(entry)
    starts = [entry for entry in by_f.get("instance", ()) if entry["what"] == "start"]
    killed = {entry["pid"] for entry in by_f.get("instance", ()) if entry["what"] == "kill"}
    complaints: list[str] = []
    leaks: list[str] = ending["leaks"]
    events: list[Event] = []
    for start in starts:
        content = (folder / start["log"]).read_bytes()
        leaks += leaks_in(content, start["log"])
        lines = content.split(b"\n")
        if start["pid"] in killed or not lines[-1]:
            lines.pop()  # what a killed process has written last may be half a line
        events += _events(lines, start, offset_s, complaints)
    return History(
        enqueues=list(_enqueues(by_f.get("enqueue", ()))),
        deliveries=[
            Arrival(
                entry["t"],
                entry["retry_id"],
                entry["queue"],
                entry["sha256"],
                entry["redelivered"],
                entry["message_id"],
                entry["retry_count"],
            )
            for entry in by_f.get("deliver", ())
        ],
        reviews=[
            Arrival(
                entry["t"],
                entry["retry_id"],
                "review",
                entry["sha256"],
                entry["redelivered"],
                entry["message_id"],
                entry["retry_count"],
                entry["reason"],
            )
            for entry in by_f.get("review", ())
        ],
        faults=list(_faults(by_f.get("fault", ()))),
        instance_events=[
            InstanceEvent(entry["t"], entry["what"], entry["instance"], entry["pid"])
            for entry in by_f.get("instance", ())
        ],
        events=sorted(events, key=lambda event: event.at),
        rows=[_row(row, offset_s) for row in ending["rows"]],
        quarantined=[Quarantined(**row) for row in ending["quarantined"]],
        samples=[
            Sample(
                entry["t"],
                entry["when"],
                entry["instance"],
                entry["pid"],
                entry["rss_kib"],
                entry["files"],
                entry["metrics"],
            )
            for entry in by_f.get("sample", ())
        ],
        complaints=complaints,
        leaks=leaks,
        healed_at=ending["healed_at"],
        quiet_at=ending["quiet_at"],
        left=ending["left"],
        backoff_ms=tuple(ending["backoff_ms"]),
        connections=ending["connections"],
        connections_most=ending["connections_most"],
    )


def _enqueues(entries: Sequence[Entry]) -> Iterator[Enqueue]:
    outcomes = {entry["operation"]: entry["type"] for entry in entries if entry["type"] != "invoke"}
    for entry in entries:
        if entry["type"] == "invoke":
            fields = {name: entry[name] for name in _ENQUEUED}
            # Without an end nobody knows: as after a lost connection.
            yield Enqueue(invoked_at=entry["t"], outcome=outcomes.get(entry["operation"], "info"), **fields)


def _faults(entries: Sequence[Entry]) -> Iterator[Fault]:
    ends: dict[int, float] = {entry["operation"]: entry["t"] for entry in entries if entry["type"] == "ok"}
    for entry in entries:
        if entry["type"] == "invoke":
            healed = ends.get(entry["operation"]) or float(entries[-1]["t"])
            yield Fault(entry["fault"], entry["target"], entry["t"], healed, entry.get("instance"))


def _events(lines: Sequence[bytes], start: Entry, offset_s: float, complaints: list[str]) -> Iterator[Event]:
    for line in lines:
        try:
            event = json.loads(line)
            at = datetime.fromisoformat(event.pop("timestamp")).timestamp() - offset_s
            message = event.pop("message")
        except (ValueError, KeyError, TypeError, AttributeError):
            complaints.append(f"{start['log']}: not an event: {line[:200].decode(errors='replace')}")
            continue
        if "exception" in event:
            complaints.append(f"{start['log']}: {message}: {event['exception'][-800:]}")
        yield Event(
            at,
            start["pid"],
            intern(message),
            _retry_id(event),
            event.get("review_reason"),
            event.get("instance"),
            event.get("late_ms"),
        )


def _retry_id(event: Mapping[str, Any]) -> str | None:
    if "quarantine_id" in event:
        return f"quarantine:{event['quarantine_id']}"
    if event.get("message_id") is None:
        return None
    return intern(f"{event['message_id']}:{event['retry_count']}")  # a long trial has many lines for each


def _row(row: Mapping[str, Any], offset_s: float) -> Row:
    finished_at = row["finished_at"]
    return Row(
        row["message_id"],
        row["retry_count"],
        row["max_retries"],
        row["status"],
        row["created_at"] - offset_s,
        None if finished_at is None else finished_at - offset_s,
        row["note"],
    )
