"""backlog: what a million and five million other rows cost those that are due.

Pending rows are due in days, spread at random, each with its 1 KiB body; executed ones were due in
the past days. Same burst as `burst`, in turns with an empty table; then the claim statement by itself.
One large table at a time: several would compete for the machine's memory.
"""

import time
import uuid
from dataclasses import dataclass

import asyncpg

from benchmarks.bed import Bed, Place
from benchmarks.contestants import AT_ONCE, AT_ONCE_DELAYS_MS, TUNED, Service
from benchmarks.figures import median, spread
from benchmarks.load import ORDERS, load
from benchmarks.scenario import Figures, Options, Row, Scenario, say
from benchmarks.usage import resident_mb
from retry_scheduler.hand import CLAIM_BYTES, CLAIM_ROWS
from retry_scheduler.presence import LEASE
from retry_scheduler.repository import LONG_AGO
from retry_scheduler.sql import query

CHUNK = 250_000
SETTINGS = {**TUNED, **AT_ONCE}
CLAIMS = 200
REQUESTS = (20_000, 2_000)

FILL = """
WITH made AS (
    INSERT INTO retry_queue (message_id, original_queue, error_reason, retry_count, max_retries,
                             next_retry_at, payload_bytes, status, finished_at)
    SELECT gen_random_uuid(), $1, 'timeout while calling the tax office', 0, 3,
           now() + $3::interval + random() * $4::interval, 1024, $5, CASE WHEN $5 = 'retried' THEN now() END
      FROM generate_series(1, $2::int)
    RETURNING id
)
INSERT INTO retry_payload (id, payload)
SELECT id, decode(repeat(md5(id::text), 64), 'hex') FROM made
"""


@dataclass(frozen=True)
class Others:
    """Rows that are in the table besides those that are measured. executed: otherwise pending."""

    rows: int
    executed: bool = False

    def __str__(self) -> str:
        return f"{self.rows:,} other {'executed' if self.executed else 'pending'} rows"


SIZES = (Others(1_000_000), Others(5_000_000), Others(5_000_000, executed=True))
SHORT_SIZES = (Others(10_000), Others(50_000), Others(50_000, executed=True))


@dataclass(frozen=True)
class Drain:
    """One burst beside other rows."""

    rate_per_s: float
    resident_mb: float
    duplicates: int


async def _measure(at: Bed, options: Options) -> Figures:
    sizes = []
    with at.place("others_none") as empty:
        await _fill(empty, Others(0))
        for number, others in enumerate(SHORT_SIZES if options.short else SIZES):
            with at.place(f"others_{number}") as place:
                sizes.append(await _beside(at, options, empty, place, others))
    return {
        "requests": options.scaled(*REQUESTS),
        "settings": SETTINGS,
        "sizes": sizes,
        "bytes_per_row": max(each["bytes_per_row"] for each in sizes),
        "claim_rows": CLAIM_ROWS,
        "duplicates": sum(each["duplicates"] for each in sizes),
    }


async def _beside(at: Bed, options: Options, empty: Place, place: Place, others: Others) -> Figures:
    count = options.scaled(*REQUESTS)
    bytes_per_row = await _fill(place, others)
    alone, beside = [], []
    for turn in range(options.repetitions):
        alone.append(await _drain(at, empty, count))
        beside.append(await _drain(at, place, count))
        say(
            f"round {turn + 1}: {beside[-1].rate_per_s:,.0f}/s beside {others},"
            f" {alone[-1].rate_per_s:,.0f}/s beside none"
        )
    rates = [median(drain.rate_per_s for drain in drains) for drains in (beside, alone)]
    return {
        "beside": str(others),
        "rows": others.rows,
        "rate_per_s": rates[0],
        "empty_per_s": rates[1],
        "share": rates[0] / rates[1],
        "claim_ms": spread(await _claim_ms(at, place, options.scaled(CLAIMS, 20))),
        "resident_mb": max(drain.resident_mb for drain in beside),
        "bytes_per_row": bytes_per_row,
        "duplicates": sum(drain.duplicates for drain in (*beside, *alone)),
    }


async def _fill(place: Place, others: Others) -> float:
    """Make the rows and return how many bytes each takes, body and indexes included."""
    began = time.monotonic()
    place.migrate()
    connection = await place.connect()
    try:
        for first in range(0, others.rows, CHUNK):
            await _insert(
                connection,
                min(CHUNK, others.rows - first),
                due_in="-30 days" if others.executed else "1 day",
                within="29 days",
                status="retried" if others.executed else "pending",
            )
        # Also does what autovacuum would otherwise do during the measurement.
        await connection.execute("VACUUM (ANALYZE) retry_queue, retry_payload")
        taken: int = await connection.fetchval(
            "SELECT pg_total_relation_size('retry_queue') + pg_total_relation_size('retry_payload')"
        )
    finally:
        await connection.close()
    say(f"{others} made in {time.monotonic() - began:.0f} s")
    return taken / others.rows if others.rows else 0.0


async def _insert(
    connection: asyncpg.Connection, rows: int, *, due_in: str, within: str, status: str = "pending"
) -> None:
    # asyncpg wants a timedelta for an interval parameter; text is cast on the server.
    statement = FILL
    for place, text in (("$3", due_in), ("$4", within), ("$5", status)):
        statement = statement.replace(place, f"'{text}'")
    await connection.execute(statement, ORDERS, rows)


async def _drain(at: Bed, place: Place, count: int) -> Drain:
    at.settle()
    service = Service(SETTINGS)
    async with service.running(place) as (program,), load(place.url, *service.entry_queues) as both:
        took_s = await both.run(count, AT_ONCE_DELAYS_MS, service.publication)
        return Drain(count / took_s, resident_mb(program.pid), both.repeated)


async def _claim_ms(at: Bed, place: Place, claims: int) -> list[float]:
    """Return how long each claim of a full batch took, without anything else going on."""
    connection = await place.connect()
    took = []
    try:
        await _insert(connection, claims * CLAIM_ROWS, due_in="-1 hour", within="10 minutes")
        at.settle()
        owner = uuid.uuid4()
        await connection.execute(query("join_instances"), owner, "bench")
        for _ in range(claims):
            began = time.perf_counter()
            rows = await connection.fetch(
                query("claim_due"),
                CLAIM_ROWS,
                LEASE,
                owner,
                CLAIM_BYTES,
                LONG_AGO,
                [],
                CLAIM_BYTES,
                CLAIM_BYTES,
            )
            took.append((time.perf_counter() - began) * 1000)
            done = [row["id"] for row in rows], [row["claims"] for row in rows]
            await connection.fetch(query("complete"), *done, ["retried"] * len(rows), [None] * len(rows))
        await connection.execute(query("leave_instances"), owner)
    finally:
        await connection.close()
    return took


def _rows(figures: Figures) -> list[Row]:
    return [
        Row(
            each["beside"],
            f"{each['share']:.2f} of the empty table's rate",
            f"{each['rate_per_s']:,.0f} beside {each['empty_per_s']:,.0f} retries/s;"
            f" claim of {figures['claim_rows']} rows p99 {each['claim_ms']['p99']:.1f} ms;"
            f" {each['resident_mb']:.0f} MB",
        )
        for each in figures["sizes"]
    ]


SCENARIO = Scenario("backlog", "Draining beside many other rows", _measure, _rows)
