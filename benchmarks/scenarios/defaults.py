"""defaults: the highest rate that one instance keeps with default settings.

A burst that is due at once shows the most that goes through. Then steady rates below it are tried,
highest first, until one is kept: the last third of its messages is no later than the middle third,
waiting on the retry queue included.
"""

import asyncio

from benchmarks.bed import Bed, Place
from benchmarks.contestants import AT_ONCE, MIXED_DELAYS_MS, Service
from benchmarks.figures import due_lateness_ms, quantile
from benchmarks.load import Load, load
from benchmarks.scenario import Figures, Options, Row, Scenario, say
from benchmarks.scenarios.burst import one_burst

# A queue that grows is later with every message; noise is not.
KEPT_WITHIN_MS = 250
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
LIMIT_S = 300


async def _measure(at: Bed, options: Options) -> Figures:
    # Warm, as the rates below are; the delays of the defaults would only part taking in from sending.
    run = await one_burst(at, Service(AT_ONCE), options.scaled(20_000, 1_000), "defaults_burst")
    ceiling = run["rate_per_s"]
    say(f"{ceiling:,.0f}/s in a burst")
    tried: list[Figures] = []
    for share in SHARES[-1:] if options.short else SHARES:
        rate = ceiling * share
        at.settle()
        with at.place(f"defaults_{share * 100:.0f}") as place:
            tried.append({"rate_per_s": rate, **await _try(place, rate, options.scaled(20, 1))})
        say(f"{rate:,.0f}/s is {'kept' if tried[-1]['kept'] else 'not kept'}")
        if tried[-1]["kept"]:
            break
    return {"ceiling_per_s": ceiling, "tried": tried, **tried[-1]}


async def _try(place: Place, rate_per_s: float, seconds: int) -> Figures:
    service = Service()
    count = int(rate_per_s * seconds)
    async with service.running(place), load(place.url, *service.entry_queues) as both:
        async with asyncio.timeout(LIMIT_S):
            await both.run(count, MIXED_DELAYS_MS, service.publication, rate_per_s=rate_per_s)
        return await _judge(place, both)


async def _judge(place: Place, both: Load) -> Figures:
    late, stored = await due_lateness_ms(place, both.arrivals, both.sent)
    total = [one + other for one, other in zip(late, stored, strict=True)]
    third = len(total) // 3
    middle, last = sorted(total[third : 2 * third]), sorted(total[2 * third :])
    return {
        "kept": quantile(last, 0.99) <= quantile(middle, 0.99) + KEPT_WITHIN_MS,
        "late_p99_ms": quantile(sorted(late), 0.99),
        "stored_p99_ms": quantile(sorted(stored), 0.99),
    }


def _rows(figures: Figures) -> list[Row]:
    value = f"{figures['rate_per_s']:,.0f} retries/s"
    late = f"p99 {figures['late_p99_ms']:.0f} ms late, after {figures['stored_p99_ms']:.0f} ms to be stored"
    return [
        Row(
            "retry-scheduler",
            value if figures["kept"] else f"below {value}",
            f"{late}; {figures['ceiling_per_s']:,.0f}/s in a burst",
        )
    ]


SCENARIO = Scenario("defaults", "Rate kept with default settings", _measure, _rows)
