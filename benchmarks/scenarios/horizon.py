"""horizon: somebody else's transaction stays open for minutes, so that PostgreSQL can clean up nothing."""

from benchmarks.bed import Bed
from benchmarks.contestants import TUNED
from benchmarks.scenario import Figures, Options, Row, Scenario
from benchmarks.scenarios.long_run import by_minute

RATE_PER_S = 500


async def _measure(at: Bed, options: Options) -> Figures:
    minutes = 1 if options.short else options.horizon_minutes
    with at.place("horizon") as place:
        place.migrate()
        foreign = await place.connect()
        try:
            async with foreign.transaction(isolation="repeatable_read"):
                await foreign.fetchval("SELECT count(*) FROM retry_queue")
                p99, memory, duplicates = await by_minute(place, TUNED, RATE_PER_S, minutes)
        finally:
            await foreign.close()
    return {
        "rate_per_s": RATE_PER_S,
        "minutes": minutes,
        "p99_ms": p99,
        "first_ms": p99[0],
        "last_ms": p99[-1],
        "resident_mb": memory,
        "duplicates": duplicates,
    }


def _rows(figures: Figures) -> list[Row]:
    return [
        Row(
            f"retry-scheduler at {figures['rate_per_s']}/s",
            f"p99 {figures['last_ms']:.1f} ms in the last minute",
            f"{figures['first_ms']:.1f} ms in the first of {figures['minutes']};"
            f" {figures['duplicates']} duplicates",
        )
    ]


SCENARIO = Scenario("horizon", "Vacuum held up by a foreign transaction", _measure, _rows, by_name_only=True)
