import asyncio

import pytest

import retry_scheduler.outage as outage_module
from retry_scheduler.outage import FIRST_PAUSE_S, LAST_PAUSE_S, OVER_AFTER_S, OutageBackoff


class Clock:
    """Stands still but for the pauses."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.pauses_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.pauses_s.append(round(seconds, 6))
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(outage_module, "time", clock)
    monkeypatch.setattr(outage_module, "asyncio", clock)
    return clock


def test_each_failure_doubles_the_pause_up_to_the_longest(clock: Clock) -> None:
    backoff = OutageBackoff()
    fail(backoff, times=7)
    assert clock.pauses_s == [FIRST_PAUSE_S, 0.2, 0.4, 0.8, LAST_PAUSE_S, LAST_PAUSE_S, LAST_PAUSE_S]


def test_tries_that_succeed_in_between_do_not_shorten_the_pauses(clock: Clock) -> None:
    backoff = OutageBackoff()
    for _ in range(5):
        fail(backoff)
        clock.now_s += OVER_AFTER_S - 0.1  # all goes well meanwhile
    fail(backoff)
    assert clock.pauses_s[-1] == LAST_PAUSE_S


def test_the_first_failure_after_a_calm_is_paused_for_shortly_again(clock: Clock) -> None:
    backoff = OutageBackoff()
    fail(backoff, times=7)
    clock.now_s += OVER_AFTER_S + 0.1
    fail(backoff, times=2)
    assert clock.pauses_s[-2:] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S]


def test_failures_during_a_pause_wait_for_its_end_and_do_not_lengthen_it(clock: Clock) -> None:
    backoff = OutageBackoff()
    began_s = clock.now_s
    fail(backoff)
    clock.now_s = began_s + FIRST_PAUSE_S / 4  # as seen by another batch
    fail(backoff)
    assert clock.pauses_s == [FIRST_PAUSE_S, pytest.approx(FIRST_PAUSE_S * 3 / 4)]
    fail(backoff)
    assert clock.pauses_s[-1] == 2 * FIRST_PAUSE_S


def fail(backoff: OutageBackoff, *, times: int = 1) -> None:
    for _ in range(times):
        asyncio.run(backoff.wait())
