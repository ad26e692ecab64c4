"""promise: the service alone, in a minute and a half. What `make bench` runs unless told otherwise.

A burst of 20,000 requests that are due at once, through one instance; and with all settings at their
defaults, 50/s for 60 s and then 200/s for 10 s, of which nothing may be later than 5 s.
"""

import asyncio
from collections.abc import Mapping, Sequence

from benchmarks.bed import Bed
from benchmarks.contestants import AT_ONCE, AT_ONCE_DELAYS_MS, MIXED_DELAYS_MS, TUNED, Service
from benchmarks.figures import due_lateness_ms, spread
from benchmarks.load import load
from benchmarks.scenario import Figures, Options, Row, Scenario

BURST_SETTINGS = {**TUNED, **AT_ONCE}
SPARE_S = 120

# (messages a second, seconds); None: as fast as the broker takes them, so many messages.
Phase = tuple[int | None, int]


async def _phases(
    at: Bed, name: str, settings: Mapping[str, str], delays_ms: Mapping[int, int], phases: Sequence[Phase]
) -> Figures:
    at.settle()
    took_s = 0.0
    with at.place(name) as place:
        service = Service(settings)
        async with service.running(place), load(place.url, *service.entry_queues) as both:
            wanted = 0
            for rate_per_s, length in phases:
                count = length if rate_per_s is None else rate_per_s * length
                wanted += count
                async with asyncio.timeout(SPARE_S + length):
                    took_s += await both.run(
                        count, delays_ms, service.publication, rate_per_s=rate_per_s, until=wanted
                    )
            late, _ = await due_lateness_ms(place, both.arrivals, both.sent)
            return {
                "requests": wanted,
                "rate_per_s": wanted / took_s,
                "late_ms": spread(late),
                "duplicates": both.repeated,
            }


async def _measure(at: Bed, options: Options) -> Figures:
    burst: list[Phase] = [(None, options.scaled(20_000, 2_000))]
    steady: list[Phase] = [(50, options.scaled(60, 2)), (200, options.scaled(10, 2))]
    return {
        "burst": await _phases(at, "promise_burst", BURST_SETTINGS, AT_ONCE_DELAYS_MS, burst),
        "steady": await _phases(at, "promise_steady", {}, MIXED_DELAYS_MS, steady),
    }


def _rows(figures: Figures) -> list[Row]:
    burst, steady = figures["burst"], figures["steady"]
    return [
        Row(
            f"burst of {burst['requests']:,}",
            f"{burst['rate_per_s']:,.0f} retries/s",
            _lateness(burst),
        ),
        Row("50/s, then 200/s, defaults", f"p99 {steady['late_ms']['p99']:.1f} ms late", _lateness(steady)),
    ]


def _lateness(figures: Figures) -> str:
    late = figures["late_ms"]
    return (
        f"late p50 {late['p50']:.1f}, p99 {late['p99']:.1f}, max {late['max']:.1f},"
        f" earliest {late['min']:.1f} ms; {figures['duplicates']} duplicates"
    )


SCENARIO = Scenario("promise", "The service alone: a burst, and the promised rates", _measure, _rows)
