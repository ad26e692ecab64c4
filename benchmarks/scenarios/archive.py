"""archive: what moving a million finished attempts into the archive costs those that are due meanwhile.

The same steady load twice on the same table, first without and then with `retry-scheduler archive` beside
it for as long as that takes. Late is arrival minus next_retry_at.
"""

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from benchmarks.bed import CHECKOUT, Bed, Place
from benchmarks.contestants import MIXED_DELAYS_MS, TUNED, Service
from benchmarks.figures import due_lateness_ms, spread
from benchmarks.load import Load, Message, load, messages
from benchmarks.scenario import Figures, Options, Row, Scenario, say
from retry_scheduler.broker.publication import Publication

RATE_PER_S = 500
SPARE_S = 60
CHUNK = 250_000

# The service's own archiving would otherwise begin by itself.
SETTINGS = {**TUNED, "JITTER_MS": "0", "RETENTION_DAYS": "0"}

FILL = """
WITH made AS (
    INSERT INTO retry_queue (message_id, original_queue, error_reason, retry_count, max_retries,
                             next_retry_at, created_at, finished_at, payload_bytes, status)
    SELECT gen_random_uuid(), 'old', 'timeout while calling the tax office', 0, 3,
           at, at - interval '2 s', at, 1024, 'retried'
      FROM (SELECT now() - interval '61 days' + random() * interval '30 days' AS at
              FROM generate_series(1, $1::int)) AS old
    RETURNING id
)
INSERT INTO retry_payload (id, payload)
SELECT id, decode(repeat(md5(id::text), 64), 'hex') FROM made
"""


async def _measure(at: Bed, options: Options) -> Figures:
    rows = options.scaled(1_000_000, 10_000)
    seconds = options.scaled(60, 2)
    with at.place("archive") as place:
        await _fill(place, rows)
        at.settle()
        service = Service(SETTINGS)
        async with service.running(place), load(place.url, *service.entry_queues) as both:
            deadline_s = time.monotonic() + seconds
            await _keep_up(both, service.publication, lambda: time.monotonic() < deadline_s)
            without = set(both.arrivals)
            say(f"{len(without):,} retries without archiving")
            began_s = time.monotonic()
            archiving = _start_archive(place)
            await _keep_up(both, service.publication, lambda: archiving.poll() is None)
            said, _ = archiving.communicate()
            took_s = time.monotonic() - began_s
            say(said.strip())
            late_without = spread(await _late_ms(place, both, without))
            late_beside = spread(await _late_ms(place, both, both.arrivals.keys() - without))
            return {
                "rows": rows,
                "rate_per_s": RATE_PER_S,
                "settings": SETTINGS,
                "archived": int(_found(r"archived ([\d,]+)", said).replace(",", "")),
                "took_s": took_s,
                "rows_per_s": rows / took_s,
                "longest_statement_ms": int(_found(r"took (\d+) ms", said)),
                "without_ms": late_without,
                "beside_ms": late_beside,
                "p99_ratio": late_beside["p99"] / late_without["p99"],
                "duplicates": both.repeated,
            }


async def _fill(place: Place, rows: int) -> None:
    began_s = time.monotonic()
    place.migrate()
    connection = await place.connect()
    try:
        for first in range(0, rows, CHUNK):
            await connection.execute(FILL, min(CHUNK, rows - first))
        # Also does what autovacuum would otherwise do during the measurement.
        await connection.execute("VACUUM (ANALYZE) retry_queue, retry_payload")
    finally:
        await connection.close()
    say(f"{rows:,} finished rows made in {time.monotonic() - began_s:.0f} s")


def _start_archive(place: Place) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "retry_scheduler", "archive", "--days", "30"],
        env={"PATH": os.defpath, **place.environment},
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        text=True,
    )


async def _keep_up(
    both: Load, publication: Callable[[Message], Publication], going: Callable[[], bool]
) -> None:
    """Send at the steady rate as long as `going` says so, and return when everything has come back."""

    def made() -> Iterator[tuple[Message, Publication]]:
        for each in messages(MIXED_DELAYS_MS):
            if not going():
                return
            yield each, publication(each)

    receiving = asyncio.create_task(both.receive(sys.maxsize))
    try:
        await both.send(made(), rate_per_s=RATE_PER_S)
        async with asyncio.timeout(SPARE_S):
            while len(both.arrivals) < len(both.sent):
                await asyncio.sleep(0.01)
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)


async def _late_ms(place: Place, both: Load, keys: "set[str]") -> list[float]:
    arrivals = {key: both.arrivals[key] for key in keys}
    return (await due_lateness_ms(place, arrivals, both.sent))[0]


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the archive command said {text!r}")
    return found[1]


def _rows(figures: Figures) -> list[Row]:
    without, beside = figures["without_ms"], figures["beside_ms"]
    return [
        Row(
            f"{figures['rate_per_s']}/s beside archiving {figures['rows']:,} rows",
            f"p99 {beside['p99']:.1f} ms late",
            f"{figures['p99_ratio']:.2f} times as late as without;"
            f" p50 {beside['p50']:.1f}, max {beside['max']:.1f} ms; {figures['duplicates']} duplicates",
        ),
        Row(
            "the same without archiving",
            f"p99 {without['p99']:.1f} ms late",
            f"p50 {without['p50']:.1f}, max {without['max']:.1f} ms",
        ),
        Row(
            "archiving",
            f"{figures['rows_per_s']:,.0f} rows/s",
            f"{figures['took_s']:.0f} s; longest statement {figures['longest_statement_ms']} ms",
        ),
    ]


SCENARIO = Scenario(
    "archive", "Lateness while a million rows are archived", _measure, _rows, by_name_only=True
)
