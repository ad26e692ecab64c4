"""idle: what an instance costs that has nothing to do, with default settings."""

import asyncio
import time

from benchmarks.bed import Bed, Place
from benchmarks.contestants import Service
from benchmarks.scenario import Figures, Options, Row, Scenario
from benchmarks.usage import resident_mb


async def _measure(at: Bed, options: Options) -> Figures:
    warm_up_s, seconds = options.scaled(5, 1), options.scaled(60, 4)
    with at.place("idle") as place:
        async with Service().running(place) as programs:
            await asyncio.sleep(warm_up_s)
            usage, statements, began = place.usage(programs), _statements(place), time.monotonic()
            await asyncio.sleep(seconds)
            took_s = time.monotonic() - began
            used = place.usage(programs)
            return {
                "seconds": seconds,
                "program_cpu_share": (used.program_s - usage.program_s) / took_s,
                "postgres_cpu_share": (used.postgres_s - usage.postgres_s) / took_s,
                "rabbitmq_cpu_share": (used.rabbitmq_s - usage.rabbitmq_s) / took_s,
                "statements_per_s": (_statements(place) - statements) / took_s,
                "resident_mb": resident_mb(programs[0].pid),
            }


def _statements(place: Place) -> int:
    # Each statement of the service is a transaction. Asked from another database, so as not to count itself.
    return int(
        place.postgres.sql(
            f"SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = '{place.name}'"
        )
    )


def _rows(figures: Figures) -> list[Row]:
    return [
        Row(
            "retry-scheduler",
            f"{figures['program_cpu_share']:.2%} of a core",
            f"{figures['statements_per_s']:.1f} statements/s; {figures['resident_mb']:.0f} MB;"
            f" PostgreSQL {figures['postgres_cpu_share']:.2%} of a core",
        )
    ]


SCENARIO = Scenario("idle", "An instance with nothing to do", _measure, _rows)
