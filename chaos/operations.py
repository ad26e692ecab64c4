"""Reads the operation log, entry by entry: a long trial has a million of them."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from sys import intern

from chaos.history import Arrival, Enqueue, Fault, InstanceEvent, Sample
from chaos.oplog import Entry, read_operations

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


class Operations:
    """What the operation log tells, typed.

    offset_s: what the wall clock is ahead of the log's own. logs: the file of each process that was started.
    """

    def __init__(self, path: Path) -> None:
        self.enqueues: list[Enqueue] = []
        self.deliveries: list[Arrival] = []
        self.reviews: list[Arrival] = []
        self.instance_events: list[InstanceEvent] = []
        self.samples: list[Sample] = []
        self.logs: dict[int, str] = {}
        self._faults: dict[int, Entry] = {}
        self._healed: dict[int, float] = {}
        self._requested: dict[int, Entry] = {}
        self._last_t = 0.0
        take: Mapping[str, Callable[[Entry], None]] = {
            "enqueue": self._enqueue,
            "deliver": lambda entry: self.deliveries.append(_arrival(entry, entry["queue"])),
            "review": lambda entry: self.reviews.append(_arrival(entry, "review")),
            "fault": self._fault,
            "instance": self._instance,
            "sample": lambda entry: self.samples.append(_sample(entry)),
            "phase": lambda entry: None,
        }
        entries = read_operations(path)
        clock = next(entries)
        self.offset_s = clock["wall"] - clock["t"]
        for entry in entries:
            take[entry["f"]](entry)
            self._last_t = entry["t"]
        for entry in self._requested.values():
            self.enqueues.append(_request(entry, "info"))  # as after a lost connection: nobody knows

    def faults(self) -> Iterator[Fault]:
        """Yield the faults in the order in which they began."""
        for operation, entry in self._faults.items():
            healed = self._healed.get(operation, self._last_t)
            yield Fault(entry["fault"], entry["target"], entry["t"], healed, entry.get("instance"))

    def _enqueue(self, entry: Entry) -> None:
        if entry["type"] == "invoke":
            self._requested[entry["operation"]] = entry
        else:
            self.enqueues.append(_request(self._requested.pop(entry["operation"]), entry["type"]))

    def _fault(self, entry: Entry) -> None:
        if entry["type"] == "invoke":
            self._faults[entry["operation"]] = entry
        else:
            self._healed[entry["operation"]] = entry["t"]

    def _instance(self, entry: Entry) -> None:
        self.instance_events.append(InstanceEvent(entry["t"], entry["what"], entry["instance"], entry["pid"]))
        if entry["what"] == "start":
            self.logs[entry["pid"]] = entry["log"]


def _request(entry: Entry, outcome: str) -> Enqueue:
    fields = {name: entry[name] for name in _ENQUEUED}
    # Many entries hold the same texts.
    shared = {name: value and intern(value) for name, value in fields.items() if isinstance(value, str)}
    return Enqueue(invoked_at=entry["t"], outcome=outcome, **fields | shared)


def _arrival(entry: Entry, queue: str) -> Arrival:
    sha256, message_id = entry["sha256"], entry["message_id"]
    return Arrival(
        entry["t"],
        intern(entry["retry_id"]),
        intern(queue),
        sha256 and intern(sha256),
        entry["redelivered"],
        message_id and intern(message_id),
        entry["retry_count"],
        entry.get("reason"),
    )


def _sample(entry: Entry) -> Sample:
    return Sample(
        entry["t"],
        entry["when"],
        entry["instance"],
        entry["pid"],
        entry["rss_kib"],
        entry["files"],
        entry["metrics"],
    )
