"""Writes a status down for a terminal: a table for each subject, plain text, no colour.

Pure: takes figures, returns lines.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from retry_scheduler.presence import STILL_AFTER
from retry_scheduler.status.figures import (
    Attempts,
    ByQueue,
    DatabaseFigures,
    Lateness,
    OldestTransaction,
    Status,
)

STATUSES = ("pending", "retried", "failed", "discarded")
MOST_QUEUES = 20
MOST_INDEXES = 8


def report(status: Status) -> str:
    """Return everything, as it is printed."""
    blocks = [_servers(status)]
    if status.stored is not None:
        stored = status.stored
        blocks += [
            _facts(status, stored),
            _by_queue(stored.by_queue),
            _instances(stored),
            _tables(stored),
        ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _servers(status: Status) -> list[str]:
    version = f"answers, tables at version {status.stored.schema_version}" if status.stored else ""
    return _aligned(
        [
            ("PostgreSQL", version if status.postgresql.up else f"AWAY: {status.postgresql.problem}"),
            ("RabbitMQ", "answers" if status.rabbitmq.up else f"AWAY: {status.rabbitmq.problem}"),
            *(
                (
                    f"  {queue.name}",
                    "does not exist"
                    if queue.messages is None
                    else f"{queue.messages:,} messages, {queue.consumers} consumers",
                )
                for queue in status.queues or ()
            ),
        ]
    )


def _facts(status: Status, stored: DatabaseFigures) -> list[str]:
    failed = sum(group.attempts for group in stored.by_queue.groups if group.status == "failed")
    about = "about " if stored.by_queue.estimated else ""
    review = stored.review
    return _aligned(
        [
            ("pending", _counted(stored.attempts.pending, stored.attempts)),
            ("due now", _due(stored.attempts)),
            ("late", _late(stored.lateness)),
            ("failed, with people", f"{about}{failed:,}"),
            (
                "quarantined",
                f"{_counted(review.quarantined, stored.attempts)}, of which"
                f" {review.quarantine_waiting:,} have not reached manual review",
            ),
            ("archived", f"about {stored.archived:,}"),
            ("oldest transaction", _transaction(stored.oldest_transaction)),
        ]
    )


def _counted(number: int, attempts: Attempts) -> str:
    return f"{number:,}" if number < attempts.counted_up_to else f"at least {number:,}"


def _due(attempts: Attempts) -> str:
    if attempts.oldest_due_at is None or attempts.oldest_due_s is None:
        return "0"
    return (
        f"{_counted(attempts.due, attempts)}, the oldest for {_duration(attempts.oldest_due_s)}"
        f" ({_time(attempts.oldest_due_at)})"
    )


def _late(late: Lateness) -> str:
    within = f"the last {_duration(late.window_s)}"
    if late.p50_s is None or late.p99_s is None or late.max_s is None:
        return f"nothing was executed in {within}"
    points = (("p50", late.p50_s), ("p99", late.p99_s), ("max", late.max_s))
    shown = ", ".join(f"{name} {seconds * 1000:,.0f} ms" for name, seconds in points)
    return f"{shown}, of {late.executed:,} executed in {within}"


def _transaction(oldest: OldestTransaction) -> str:
    said = "none"
    if oldest.open_s is not None:
        said = f"open for {_duration(oldest.open_s)}: {oldest.who}"
    if oldest.replication_slot_age:
        said += f"; a replication slot needs the last {oldest.replication_slot_age:,} transactions"
    if oldest.hidden_sessions:
        said += f"; {oldest.hidden_sessions} sessions hidden from this role (see docs/operations.md)"
    return said


def _by_queue(by_queue: ByQueue) -> list[str]:
    counts: defaultdict[str, dict[str, int]] = defaultdict(dict)  # in order of the largest group
    for group in by_queue.groups:
        counts[group.queue][group.status] = group.attempts
    if not counts:
        return []
    title = "attempts by queue" + (" (estimated from a sample)" if by_queue.estimated else "")
    rows = [
        (queue, *(f"{each.get(status, 0):,}" for status in STATUSES))
        for queue, each in list(counts.items())[:MOST_QUEUES]
    ]
    more = len(counts) - MOST_QUEUES
    return _table((title, *STATUSES), rows) + ([f"and {more} queues more"] if more > 0 else [])


def _instances(stored: DatabaseFigures) -> list[str]:
    if not stored.instances:
        return ["no instance is running"]
    rows = [
        (
            each.name,
            _time(each.started_at),
            "beating"
            if each.silent_s < STILL_AFTER.total_seconds()
            else f"SILENT {_duration(each.silent_s)}",
        )
        for each in stored.instances
    ]
    return _table(("instance", "started", "state"), rows)


def _tables(stored: DatabaseFigures) -> list[str]:
    tables = [
        (
            each.name,
            f"{each.rows:,}",
            f"{each.dead_rows:,}",
            _size(each.total_bytes),
            _size(each.index_bytes),
            _time(each.vacuumed_at) if each.vacuumed_at else "never",
        )
        for each in stored.tables
    ]
    indexes = [(each.name, _size(each.bytes)) for each in stored.indexes[:MOST_INDEXES]]
    return [
        *_table(("table", "rows (about)", "dead (about)", "size", "of it indexes", "vacuumed"), tables),
        "",
        *_table(("index", "size"), indexes),
    ]


def _aligned(pairs: Sequence[tuple[str, str]]) -> list[str]:
    wide = max(len(name) for name, _ in pairs)
    return [f"{_printable(name):<{wide}}  {_printable(value)}" for name, value in pairs]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return lines: the first column to the left, the others to the right."""
    lines = [[_printable(cell) for cell in row] for row in (head, *rows)]
    wide = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(wide[column]) if column == 0 else cell.rjust(wide[column])
            for column, cell in enumerate(line)
        ).rstrip()
        for line in lines
    ]


def _printable(text: str) -> str:
    """Return text in which a stranger's queue name cannot steer the terminal."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def _duration(seconds: float) -> str:
    for unit, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def _size(size: int) -> str:
    number, units = float(size), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while number >= 1000 and unit != "TB":
        number, unit = number / 1000, next(units)
    return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
