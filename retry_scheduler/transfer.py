"""How much longer something may take because it moves many bytes, over a link or onto a disk."""

# Bodies above a megabyte delay whatever is behind them, and are counted apart.
LARGE_BYTES = 1024 * 1024

# The slowest link, or disk, that the service is to work with. A message may have 128 MiB.
SLOWEST_BYTES_PER_S = 2 * 1024 * 1024


def transfer_s(moved_bytes: int) -> float:
    """Return for how many seconds `moved_bytes` may be on their way."""
    return moved_bytes / SLOWEST_BYTES_PER_S
