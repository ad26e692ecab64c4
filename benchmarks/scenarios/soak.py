"""soak: a high steady rate for half an hour. Does anything grow?"""

from benchmarks.bed import Bed
from benchmarks.contestants import TUNED
from benchmarks.figures import median
from benchmarks.scenario import Figures, Options, Row, Scenario
from benchmarks.scenarios.long_run import by_minute

RATE_PER_S = 1000
EDGE_MINUTES = 5


async def _measure(at: Bed, options: Options) -> Figures:
    minutes = 1 if options.short else options.soak_minutes
    with at.place("soak") as place:
        p99, memory, duplicates = await by_minute(place, TUNED, RATE_PER_S, minutes)
    return {
        "rate_per_s": RATE_PER_S,
        "minutes": minutes,
        "edge_minutes": EDGE_MINUTES,
        "p99_ms": p99,
        "first_ms": median(p99[:EDGE_MINUTES]),
        "last_ms": median(p99[-EDGE_MINUTES:]),
        "resident_mb": memory,
        # From the second minute on: pools and buffers have their size by then.
        "grown_mb": memory[-1] - memory[min(1, len(memory) - 1)],
        "duplicates": duplicates,
    }


def _rows(figures: Figures) -> list[Row]:
    return [
        Row(
            f"retry-scheduler at {figures['rate_per_s']:,}/s",
            f"p99 {figures['last_ms']:.1f} ms in the last {figures['edge_minutes']} minutes",
            f"{figures['first_ms']:.1f} ms in the first {figures['edge_minutes']} of {figures['minutes']}"
            " (medians of each minute's p99);"
            f" memory {figures['grown_mb']:+.1f} MB; {figures['duplicates']} duplicates",
        )
    ]


SCENARIO = Scenario("soak", "A high rate for half an hour", _measure, _rows, by_name_only=True)
