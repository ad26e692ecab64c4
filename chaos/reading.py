"""Builds a history from what a trial has left: its operation log, the services' logs, and its ending."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from sys import intern
from typing import Any

from chaos.bed import SECRETS
from chaos.history import Event, History, Quarantined, Row
from chaos.operations import Operations
from chaos.requests import PAYLOAD_MARK

ROWS = """SELECT message_id, retry_count, max_retries, status, last_error AS note, claims,
       extract(epoch FROM created_at)::float8 AS created_at,
       extract(epoch FROM finished_at)::float8 AS finished_at FROM retry_queue"""
QUARANTINED = """SELECT id, encode(sha256, 'hex') AS sha256, delivered_at IS NOT NULL AS delivered
  FROM retry_quarantine"""

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
    not_ready: Sequence[str]
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
    done = Operations(folder / OPERATIONS)
    logs = _Logs(folder, done)
    return History(
        enqueues=done.enqueues,
        deliveries=done.deliveries,
        reviews=done.reviews,
        faults=list(done.faults()),
        instance_events=done.instance_events,
        events=sorted(logs.events, key=lambda event: event.at),
        rows=[_row(row, done.offset_s) for row in ending["rows"]],
        quarantined=[Quarantined(**row) for row in ending["quarantined"]],
        samples=done.samples,
        complaints=logs.complaints,
        leaks=[*ending["leaks"], *logs.leaks],
        healed_at=ending["healed_at"],
        quiet_at=ending["quiet_at"],
        left=ending["left"],
        not_ready=ending["not_ready"],
        backoff_ms=tuple(ending["backoff_ms"]),
        connections=ending["connections"],
        connections_most=ending["connections_most"],
    )


class _Logs:
    """The services' own logs, line by line."""

    def __init__(self, folder: Path, done: Operations) -> None:
        self.events: list[Event] = []
        self.complaints: list[str] = []
        self.leaks: list[str] = []
        killed = {event.pid for event in done.instance_events if event.what == "kill"}
        for pid, name in done.logs.items():
            with (folder / name).open("rb") as lines:
                for line in lines:
                    # What a killed process has written last may be half a line.
                    if line.endswith(b"\n") or pid not in killed:
                        self._read(line, pid, name, done.offset_s)

    def _read(self, line: bytes, pid: int, name: str, offset_s: float) -> None:
        self.leaks += leaks_in(line, name)
        try:
            event = json.loads(line)
            at = datetime.fromisoformat(event.pop("timestamp")).timestamp() - offset_s
            message = event.pop("message")
        except (ValueError, KeyError, TypeError, AttributeError):
            self.complaints.append(f"{name}: not an event: {line[:200].decode(errors='replace')}")
            return
        if "exception" in event:
            self.complaints.append(f"{name}: {message}: {event['exception'][-800:]}")
        self.events.append(
            Event(
                at,
                pid,
                intern(message),
                _retry_id(event),
                event.get("review_reason"),
                event.get("instance"),
                event.get("late_ms"),
            )
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
        intern(row["message_id"]),
        row["retry_count"],
        row["max_retries"],
        row["status"],
        row["created_at"] - offset_s,
        None if finished_at is None else finished_at - offset_s,
        row["note"],
        row["claims"],
    )
