"""Quantiles, medians, and how late retries were by the database's clock."""

from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.bed import Place

__all__ = ["distribution", "due_lateness_ms", "median", "quantile", "rounded", "spread"]

# The points of the picture, whose axis ends at 99.9 %.
_POINTS = (*(n / 100 for n in range(0, 90, 2)), *(n / 1000 for n in range(900, 990, 5)))
_TAIL = tuple(n / 10_000 for n in range(9900, 9991, 5))


def quantile(ascending: Sequence[float], part: float) -> float:
    """Return the smallest value that `part` of the values do not exceed. Needs at least one."""
    return ascending[min(int(len(ascending) * part), len(ascending) - 1)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return earliest, p50, p99, max and count of `values`, in their own unit."""
    ascending = sorted(values)
    return {
        "min": ascending[0],
        "p50": quantile(ascending, 0.5),
        "p99": quantile(ascending, 0.99),
        "max": ascending[-1],
        "count": len(ascending),
    }


def distribution(values: Sequence[float]) -> list[tuple[float, float]]:
    """Return (share, value not exceeded by that share) for a picture."""
    ascending = sorted(values)
    return [(part, quantile(ascending, part)) for part in _POINTS + _TAIL]


def rounded(value: object) -> object:
    """Return the same structure with every number cut to four significant digits, for a file to read."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value


async def due_lateness_ms(
    place: Place, arrivals: Mapping[str, float], sent: Mapping[str, tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Return two lists in ms, in order of storing: how late retries arrived, and how long storing took.

    Late is arrival minus next_retry_at, so that it includes the delivery; one clock for all. Stored is
    created_at minus the upstream's publishing.
    """
    connection = await place.connect()
    try:
        rows = await connection.fetch(
            "SELECT message_id || ':' || retry_count AS key,"
            "       extract(epoch FROM next_retry_at)::float8 AS due,"
            "       extract(epoch FROM created_at)::float8 AS stored"
            "  FROM retry_queue WHERE status = 'retried' ORDER BY id"
        )
    finally:
        await connection.close()
    late = [(arrivals[row["key"]] - row["due"]) * 1000 for row in rows if row["key"] in arrivals]
    stored = [(row["stored"] - sent[row["key"]][0]) * 1000 for row in rows if row["key"] in sent]
    return late, stored
