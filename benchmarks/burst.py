"""`make bench`: how many retries a second, and how late, through one instance on this machine.

    burst        20,000 requests at once, due at once: from the first publish to the last arrival
    punctuality  200 requests a second for 20 s, delays of 2, 4 and 8 s mixed, default settings
    promise      50 a second for 60 s, then 200 a second for 10 s, default settings: at most 5 s late

Upstream, consumer, both servers and the service share the machine's cores. Lateness is arrival at
the consumer minus next_retry_at in the table, on one clock, so that it includes the delivery.
"""

import argparse
import asyncio
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import uvloop

from benchmarks.bed import Bed, bed
from benchmarks.load import load
from retry_scheduler.sql import migrations

BURST_SETTINGS = {"RABBITMQ_PREFETCH": "1000", "BASE_DELAY_MS": "1", "JITTER_MS": "0"}


async def lateness_ms(at: Bed, arrivals: dict[str, float]) -> list[float]:
    """Return arrival minus due time of every retry that arrived, in ms, ascending."""
    environment = at.environment
    connection = await asyncpg.connect(
        host=environment["POSTGRES_HOST"],
        port=int(environment["POSTGRES_PORT"]),
        user=environment["POSTGRES_USER"],
        database=environment["POSTGRES_DB"],
    )
    try:
        rows = await connection.fetch(
            "SELECT message_id || ':' || retry_count AS key, extract(epoch FROM next_retry_at)::float8 AS due"
            "  FROM retry_queue WHERE status = 'retried'"
        )
    finally:
        await connection.close()
    return sorted((arrivals[row["key"]] - row["due"]) * 1000 for row in rows if row["key"] in arrivals)


def share(values: list[float], part: float) -> float:
    """Return the value that `part` of the sorted `values` do not exceed."""
    return values[min(int(len(values) * part), len(values) - 1)]


async def burst(at: Bed, count: int) -> str:
    """Run the burst and return its line of the report."""
    with at.service(BURST_SETTINGS) as service:
        async with load(at.rabbitmq.url()) as both:
            cpu_before = service.cpu_seconds()
            began = time.monotonic()
            async with asyncio.timeout(300), asyncio.TaskGroup() as sides:
                sides.create_task(both.send(count))
                sides.create_task(both.receive(count))
            took_s = time.monotonic() - began
            cpu_us = (service.cpu_seconds() - cpu_before) / count * 1e6
            late = await lateness_ms(at, both.arrivals)
            return (
                f"burst        {count / took_s:10,.0f} retries/s   lateness p50 {share(late, 0.5):7.1f} ms  "
                f"p99 {share(late, 0.99):7.1f} ms   {cpu_us:.0f} us CPU per retry, "
                f"{service.resident_mb():.0f} MB, {both.repeated} duplicates"
            )


async def steady(at: Bed, label: str, phases: Sequence[tuple[int, int]]) -> str:
    """Run at steady rates with default settings and return the line of the report.

    phases: (requests a second, seconds), one after the other.
    """
    count = sum(rate_per_s * seconds for rate_per_s, seconds in phases)
    with at.service({}):
        async with load(at.rabbitmq.url()) as both:

            async def send() -> None:
                for rate_per_s, seconds in phases:
                    await both.send(rate_per_s * seconds, rate_per_s=rate_per_s, retry_counts=(0, 1, 2))

            async with (
                asyncio.timeout(sum(seconds for _, seconds in phases) + 60),
                asyncio.TaskGroup() as sides,
            ):
                sides.create_task(send())
                sides.create_task(both.receive(count))
            late = await lateness_ms(at, both.arrivals)
            rates = " then ".join(f"{rate_per_s}/s" for rate_per_s, _ in phases)
            return (
                f"{label:11s}  {rates:>18s}   lateness p50 {share(late, 0.5):7.1f} ms  "
                f"p99 {share(late, 0.99):7.1f} ms   max {late[-1]:.1f} ms, earliest {late[0]:.1f} ms, "
                f"{both.repeated} duplicates"
            )


def main() -> None:
    """Run the benchmark and print its report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000, help="size of the burst")
    parser.add_argument("--seconds", type=int, default=20, help="length of the punctuality run")
    parser.add_argument("--short", action="store_true", help="leave out the 70 s of the promise")
    options = parser.parse_args()
    print(f"{_processor()}, {os.cpu_count()} cores shared by everything; {len(migrations())} migration(s)")
    with bed() as at:
        print(uvloop.run(burst(at, options.requests)), flush=True)
    with bed() as at:
        print(uvloop.run(steady(at, "punctuality", [(200, options.seconds)])), flush=True)
    if not options.short:
        with bed() as at:
            print(uvloop.run(steady(at, "promise", [(50, 60), (200, 10)])), flush=True)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
