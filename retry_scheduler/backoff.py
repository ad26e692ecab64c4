"""Works out how long a failed message waits before its next attempt.

Pure arithmetic: no clock, no network, no settings. Callers bring the policy and the dice.
"""

from dataclasses import dataclass
from datetime import timedelta

# 2 ** 40 ms is 34 years, far above any cap; without a limit, retry_count = 2**31 - 1 would be
# a number of 256 MB.
MAX_DOUBLINGS = 40

_MICROSECOND = timedelta(microseconds=1)

# The longest wait that a request may ask for with retry_after_ms (docs/contract.md, "Asking for a retry").
MAX_RETRY_AFTER = timedelta(hours=24)

# Returned, refused or lost publications wait at least this long, whatever the policy says: with
# a base delay of 0 a missing queue would otherwise be tried thousands of times a second.
MIN_REPUBLISH_DELAY = timedelta(milliseconds=100)


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """How delays grow: `base`, doubled for each attempt made, at most `cap`, plus up to `jitter`."""

    base: timedelta
    cap: timedelta
    jitter: timedelta


def delay_before_retry(retry_count: int, policy: BackoffPolicy, roll: float) -> timedelta:
    """Return how long an attempt waits: min(base * 2 ** retry_count, cap) + jitter * roll.

    retry_count: how many retries the message has had already, 0 or more.
    roll: uniform in [0, 1), normally random.random(); 0 means no jitter.
    Result: at least zero, at most policy.cap + policy.jitter.
    Raises ValueError if retry_count is negative.

    >>> policy = BackoffPolicy(timedelta(seconds=2), timedelta(seconds=60), timedelta(seconds=1))
    >>> [delay_before_retry(n, policy, roll=0.0).seconds for n in (0, 1, 2, 3, 2**31 - 1)]
    [2, 4, 8, 16, 60]
    """
    if retry_count < 0:
        raise ValueError(f"retry_count counts from 0, got {retry_count}")
    # In whole microseconds: a timedelta times a float costs more than all the rest of this.
    grown_us = (policy.base // _MICROSECOND) << min(retry_count, MAX_DOUBLINGS)
    # The jitter comes on top of the cap: within it, capped attempts would all be due together.
    jitter_us = int(policy.jitter // _MICROSECOND * roll)
    return timedelta(microseconds=min(grown_us, policy.cap // _MICROSECOND) + jitter_us)


def delay_asked_for(retry_after_ms: int) -> timedelta:
    """Return the delay that the request itself asks for, at most MAX_RETRY_AFTER.

    >>> delay_asked_for(1500), delay_asked_for(10**30)
    (datetime.timedelta(seconds=1, microseconds=500000), datetime.timedelta(days=1))
    """
    longest_ms = MAX_RETRY_AFTER // timedelta(milliseconds=1)
    return timedelta(milliseconds=min(retry_after_ms, longest_ms))


def delay_before_republish(publish_failures: int, policy: BackoffPolicy, roll: float) -> timedelta:
    """Return how long a row waits after a publication that was returned, refused or lost.

    publish_failures: how many times in a row, 1 or more, counting this one.
    Result: at least MIN_REPUBLISH_DELAY.
    """
    return max(delay_before_retry(max(publish_failures - 1, 0), policy, roll), MIN_REPUBLISH_DELAY)
