"""steady, fast: how late retries are at a steady rate, with delays of 2, 4 and 8 s mixed.

Late is arrival minus (sending plus delay): for everybody the same, storing included. For the service
also arrival minus next_retry_at, which is what its promise is about: never early, at most 5 s late.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.bed import Bed
from benchmarks.contestants import MIXED_DELAYS_MS, TUNED, Contestant, Native, Service, yardsticks
from benchmarks.figures import distribution, due_lateness_ms, spread
from benchmarks.load import load
from benchmarks.scenario import Figures, Options, Row, Scenario, say

# Without jitter everybody has the same delays. The service's other settings are its defaults.
NO_JITTER = {"JITTER_MS": "0"}
LIMIT_S = 120

# A short run has no time to wait for 8 s.
SHORT_DELAYS_MS = {0: 250, 1: 500, 2: 1000}


@dataclass(frozen=True)
class Pace:
    """How fast, how long, and with which delays by retry_count."""

    rate_per_s: int
    seconds: int
    delays_ms: Mapping[int, int]

    @property
    def settings(self) -> dict[str, str]:
        """What the service needs to have these delays and no others."""
        usual = self.delays_ms == MIXED_DELAYS_MS
        return NO_JITTER if usual else {**NO_JITTER, "BASE_DELAY_MS": str(self.delays_ms[0])}


@dataclass
class Late:
    """What was measured, in ms. by_table: of the service only."""

    end_to_end: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    by_table: list[float] = field(default_factory=list)
    duplicates: int = 0


async def _run(at: Bed, contestant: Contestant, pace: Pace, late: Late, name: str) -> None:
    at.settle()
    with at.place(name) as place:
        async with contestant.running(place), load(place.url, *contestant.entry_queues) as both:
            async with asyncio.timeout(pace.seconds + LIMIT_S):
                count = pace.rate_per_s * pace.seconds
                await both.run(count, pace.delays_ms, contestant.publication, rate_per_s=pace.rate_per_s)
            late.end_to_end[contestant.name] += both.lateness_ms()
            if contestant.name == Service.name:
                late.by_table += (await due_lateness_ms(place, both.arrivals, both.sent))[0]
                late.duplicates += both.repeated


async def _compare(at: Bed, contestants: list[Contestant], options: Options, pace: Pace) -> Figures:
    absent = {c.name: because for c in contestants if (because := c.absent_because())}
    late = Late()
    for turn in range(options.repetitions):
        for place_in_line, contestant in enumerate(contestants):
            if contestant.name not in absent:
                await _run(at, contestant, pace, late, f"steady_{turn}_{place_in_line}")
                so_far = spread(late.end_to_end[contestant.name])
                say(f"round {turn + 1}: {contestant.name}: p99 so far {so_far['p99']:.1f} ms")
    return {
        "rate_per_s": pace.rate_per_s,
        "seconds": pace.seconds,
        "delays_ms": list(pace.delays_ms.values()),
        "by_table_ms": spread(late.by_table),
        "end_to_end_ms": {name: spread(each) for name, each in late.end_to_end.items()},
        "distributions": {name: distribution(each) for name, each in late.end_to_end.items()},
        "duplicates": late.duplicates,
        "absent": absent,
    }


async def _measure_steady(at: Bed, options: Options) -> Figures:
    pace = Pace(200, options.scaled(20, 1), _delays_ms(options))
    return await _compare(at, [Service(pace.settings), *yardsticks(pace.delays_ms)], options, pace)


async def _measure_fast(at: Bed, options: Options) -> Figures:
    pace = Pace(1000, options.scaled(20, 1), _delays_ms(options))
    service = Service({**TUNED, **pace.settings})
    return await _compare(at, [service, Native(tuple(pace.delays_ms.values()))], options, pace)


def _delays_ms(options: Options) -> dict[int, int]:
    return SHORT_DELAYS_MS if options.short else MIXED_DELAYS_MS


def _rows(figures: Figures) -> list[Row]:
    table = figures["by_table_ms"]
    rows = [
        Row(
            "retry-scheduler, after next_retry_at",
            f"p99 {table['p99']:.1f} ms late",
            f"p50 {table['p50']:.1f}, max {table['max']:.1f}, earliest {table['min']:.1f} ms;"
            f" {figures['duplicates']} duplicates",
        )
    ]
    for name, each in figures["end_to_end_ms"].items():
        beside = f"p50 {each['p50']:.1f}, max {each['max']:.1f} ms"
        rows.append(Row(f"{name}, end to end", f"p99 {each['p99']:.1f} ms late", beside))
    return rows + [Row(name, "not measured", because) for name, because in figures["absent"].items()]


STEADY = Scenario("steady", "Lateness at 200/s, delays of 2, 4 and 8 s, defaults", _measure_steady, _rows)
FAST = Scenario("fast", "Lateness at 1,000/s, delays of 2, 4 and 8 s, tuned", _measure_fast, _rows)
