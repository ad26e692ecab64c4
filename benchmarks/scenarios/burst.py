"""burst: everything at once, due at once, through one instance, beside all yardsticks.

From the first publish to the last arrival at the consumer; rounds in turns, medians.
"""

import asyncio
from collections import defaultdict
from typing import Any

from benchmarks.bed import Bed
from benchmarks.contestants import AT_ONCE, AT_ONCE_DELAYS_MS, TUNED, Contestant, Service, yardsticks
from benchmarks.figures import median
from benchmarks.load import load
from benchmarks.scenario import Figures, Options, Row, Scenario, say
from benchmarks.usage import peak_resident_mb

LIMIT_S = 600
SETTINGS = {**TUNED, **AT_ONCE}


async def one_burst(at: Bed, contestant: Contestant, count: int, name: str) -> dict[str, float]:
    """Run one burst in a place of its own and return its figures."""
    at.settle()
    with at.place(name) as place:
        async with contestant.running(place) as programs, load(place.url, *contestant.entry_queues) as both:
            before = place.usage(programs)
            async with asyncio.timeout(LIMIT_S):
                took_s = await both.run(count, AT_ONCE_DELAYS_MS, contestant.publication)
            cpu_us = place.usage(programs).per_retry_us(before, count)
            return {
                "rate_per_s": count / took_s,
                "duplicates": both.repeated,
                # A pool keeps for minutes what it has opened: so many were in use at once.
                "postgres_connections": place.connections(),
                "peak_mb": sum(peak_resident_mb(program.pid) for program in programs),
                **{f"{who}_us": value for who, value in cpu_us.items()},
            }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure, but the sum of duplicates."""
    together = {name: median(run[name] for run in runs) for name in runs[0]}
    return {**together, "duplicates": sum(run["duplicates"] for run in runs)}


async def _measure(at: Bed, options: Options) -> Figures:
    count = options.scaled(50_000, 3_000)
    contestants: list[Contestant] = [Service(SETTINGS), *yardsticks(AT_ONCE_DELAYS_MS)]
    absent = {c.name: because for c in contestants if (because := c.absent_because())}
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    # A server's first second of work is slow, and would only hit the first in line.
    await one_burst(at, contestants[1], count // 5, "burst_warm_up")
    for turn in range(options.repetitions):
        for place_in_line, contestant in enumerate(contestants):
            if contestant.name in absent:
                continue
            run = await one_burst(at, contestant, count, f"burst_{turn}_{place_in_line}")
            runs[contestant.name].append(run)
            say(f"round {turn + 1}: {contestant.name}: {run['rate_per_s']:,.0f}/s")
    middle = {name: medians(each) for name, each in runs.items()}
    ours = middle[Service.name]["rate_per_s"]
    return {
        "requests": count,
        "settings": SETTINGS,
        "contestants": middle,
        "ratios": {name: ours / figures["rate_per_s"] for name, figures in middle.items()},
        "rounds": {name: [run["rate_per_s"] for run in each] for name, each in runs.items()},
        "absent": absent,
    }


def _rows(figures: Figures) -> list[Row]:
    rows = [
        Row(name, f"{each['rate_per_s']:,.0f} retries/s", _beside(name, each, figures["ratios"][name]))
        for name, each in figures["contestants"].items()
    ]
    return rows + [Row(name, "not measured", because) for name, because in figures["absent"].items()]


def _beside(name: str, each: dict[str, Any], ratio: float) -> str:
    cpu = f"CPU us/retry {each['program_us']:.0f} + {each['rabbitmq_us']:.0f} + {each['postgres_us']:.0f}"
    if name == Service.name:
        return f"{cpu}; {each['peak_mb']:.0f} MB; {each['duplicates']:.0f} duplicates"
    return f"{cpu}; the service is at {ratio:.2f} of it"


SCENARIO = Scenario("burst", "Burst, one instance, tuned", _measure, _rows)
