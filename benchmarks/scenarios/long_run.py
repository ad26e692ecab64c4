"""What `horizon` and `soak` share: a steady rate for minutes, and lateness minute by minute."""

import asyncio
from collections.abc import Mapping

from benchmarks.bed import Place
from benchmarks.contestants import MIXED_DELAYS_MS, Service
from benchmarks.figures import quantile
from benchmarks.load import load
from benchmarks.usage import resident_mb

SPARE_S = 120
MINUTE_S = 60


async def by_minute(
    place: Place, settings: Mapping[str, str], rate_per_s: int, minutes: int
) -> tuple[list[float], list[float], int]:
    """Return p99 of lateness (ms, end to end) and resident memory (MB) of each minute, and duplicates."""
    service = Service({**settings, "JITTER_MS": "0"})
    memory: list[float] = []
    async with service.running(place) as (program,), load(place.url, *service.entry_queues) as both:

        async def watch() -> None:
            while True:
                memory.append(resident_mb(program.pid))
                await asyncio.sleep(MINUTE_S)

        watching = asyncio.create_task(watch())
        try:
            async with asyncio.timeout(minutes * MINUTE_S + SPARE_S):
                count = rate_per_s * minutes * MINUTE_S
                await both.run(count, MIXED_DELAYS_MS, service.publication, rate_per_s=rate_per_s)
        finally:
            watching.cancel()
        late = both.lateness_ms()
        each = rate_per_s * MINUTE_S
        p99 = [quantile(sorted(late[first : first + each]), 0.99) for first in range(0, len(late), each)]
        return p99, memory, both.repeated
