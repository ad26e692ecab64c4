"""instances: four instances on one machine, beside one: what working together costs."""

from collections import defaultdict

from benchmarks.bed import Bed
from benchmarks.contestants import Service
from benchmarks.figures import median
from benchmarks.scenario import Figures, Options, Row, Scenario, say
from benchmarks.scenarios.burst import SETTINGS, one_burst

TOGETHER = 4


async def _measure(at: Bed, options: Options) -> Figures:
    count = options.scaled(20_000, 2_000)
    rates: dict[int, list[float]] = defaultdict(list)
    duplicates = 0
    for turn in range(options.repetitions):
        for instances in (1, TOGETHER):
            run = await one_burst(at, Service(SETTINGS, instances), count, f"instances_{turn}_{instances}")
            rates[instances].append(run["rate_per_s"])
            duplicates += int(run["duplicates"])
            say(f"round {turn + 1}: {instances} instance(s): {run['rate_per_s']:,.0f}/s")
    one, four = median(rates[1]), median(rates[TOGETHER])
    return {
        "requests": count,
        "instances": TOGETHER,
        "one_per_s": one,
        "together_per_s": four,
        "share": four / one,
        "duplicates": duplicates,
    }


def _rows(figures: Figures) -> list[Row]:
    return [
        Row(
            f"{figures['instances']} instances",
            f"{figures['share']:.2f} of one instance's rate",
            f"{figures['together_per_s']:,.0f} beside {figures['one_per_s']:,.0f} retries/s;"
            f" {figures['duplicates']} duplicates",
        )
    ]


SCENARIO = Scenario("instances", "Four instances", _measure, _rows)
