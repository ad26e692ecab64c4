"""backlog: what a million and five million other pending rows cost those that are due.

The rows are due in days, spread at random, each with its 1 KiB body. Same burst as `burst`, in turns
with an empty table; then the claim statement by itself.
"""

import time
import uuid

import asyncpg

from benchmarks.bed import Bed, Place
from benchmarks.contestants import AT_ONCE, AT_ONCE_DELAYS_MS, TUNED, Service
from benchmarks.figures import median, spread
from benchmarks.load import ORDERS, load
from benchmarks.scenario import Figures, Options, Row, Scenario, say
from benchmarks.usage import resident_mb
from retry_scheduler.repository import LONG_AGO
from retry_scheduler.scheduler import CLAIM_BYTES, CLAIM_ROWS, LEASE
from retry_scheduler.sql import query

CHUNK = 250_000
SETTINGS = {**TUNED, **AT_ONCE}
CLAIMS = 200

FILL = """
WITH made AS (
    INSERT INTO retry_queue (message_id, original_queue, error_reason, retry_count, max_retries,
                             next_retry_at, payload_bytes)
    SELECT gen_random_uuid(), $1, 'timeout while calling the tax office', 0, 3,
           now() + $3::interval + random() * $4::interval, 1024
      FROM generate_series(1, $2::int)
    RETURNING id
)
INSERT INTO retry_payload (id, payload)
SELECT id, decode(repeat(md5(id::text), 64), 'hex') FROM made
"""


async def _measure(at: Bed, options: Options) -> Figures:
    sizes = [0, 10_000, 50_000] if options.short else [0, 1_000_000, 5_000_000]
    count = options.scaled(20_000, 2_000)
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    memory: dict[int, float] = {}
    bytes_each = 0.0
    duplicates = 0
    places = [at.place(f"pending_{size}") for size in sizes]
    with places[0] as empty, places[1] as some, places[2] as many:
        by_size = dict(zip(sizes, (empty, some, many), strict=True))
        for size, place in by_size.items():
            began = time.monotonic()
            bytes_each = await _fill(place, size)
            say(f"{size:,} pending rows made in {time.monotonic() - began:.0f} s")
        for turn in range(options.repetitions):
            for size, place in by_size.items():
                rate, memory[size], repeated = await _drain(at, place, count)
                rates[size].append(rate)
                duplicates += repeated
                say(f"round {turn + 1}: {rate:,.0f}/s beside {size:,} pending rows")
        claims = {
            size: spread(await _claim_ms(place, options.scaled(CLAIMS, 20)))
            for size, place in by_size.items()
        }
    middle = {size: median(each) for size, each in rates.items()}
    return {
        "requests": count,
        "settings": SETTINGS,
        "sizes": [
            {
                "pending": size,
                "rate_per_s": middle[size],
                "share": middle[size] / middle[0],
                "claim_ms": claims[size],
                "resident_mb": memory[size],
            }
            for size in sizes
        ],
        "bytes_per_row": bytes_each,
        "claim_rows": CLAIM_ROWS,
        "duplicates": duplicates,
    }


async def _fill(place: Place, size: int) -> float:
    """Make `size` pending rows and return how many bytes each takes, body and indexes included."""
    place.migrate()
    connection = await place.connect()
    try:
        for first in range(0, size, CHUNK):
            await _insert(connection, min(CHUNK, size - first), due_in="1 day", within="30 days")
        # Also does what autovacuum would otherwise do during the measurement.
        await connection.execute("VACUUM (ANALYZE) retry_queue, retry_payload")
        taken: int = await connection.fetchval(
            "SELECT pg_total_relation_size('retry_queue') + pg_total_relation_size('retry_payload')"
        )
        return taken / size if size else 0.0
    finally:
        await connection.close()


async def _insert(connection: asyncpg.Connection, rows: int, *, due_in: str, within: str) -> None:
    # asyncpg wants a timedelta for an interval parameter; text is cast on the server.
    await connection.execute(FILL.replace("$3", f"'{due_in}'").replace("$4", f"'{within}'"), ORDERS, rows)


async def _drain(at: Bed, place: Place, count: int) -> tuple[float, float, int]:
    at.settle()
    service = Service(SETTINGS)
    async with service.running(place) as (program,), load(place.url, *service.entry_queues) as both:
        took_s = await both.run(count, AT_ONCE_DELAYS_MS, service.publication)
        return count / took_s, resident_mb(program.pid), both.repeated


async def _claim_ms(place: Place, claims: int) -> list[float]:
    """Return how long each claim of a full batch took, without anything else going on."""
    connection = await place.connect()
    took = []
    try:
        await _insert(connection, claims * CLAIM_ROWS, due_in="-1 hour", within="10 minutes")
        owner = uuid.uuid4()
        await connection.execute(query("join_instances"), owner, "bench")
        for _ in range(claims):
            began = time.perf_counter()
            rows = await connection.fetch(
                query("claim_due"), CLAIM_ROWS, LEASE, owner, CLAIM_BYTES, LONG_AGO, []
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
            f"{each['pending']:,} other pending rows",
            f"{each['share']:.2f} of the empty table's rate",
            f"{each['rate_per_s']:,.0f} retries/s; claim of {figures['claim_rows']} rows"
            f" p99 {each['claim_ms']['p99']:.1f} ms; {each['resident_mb']:.0f} MB",
        )
        for each in figures["sizes"]
    ]


SCENARIO = Scenario("backlog", "Draining beside many pending rows", _measure, _rows)
