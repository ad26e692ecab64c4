"""The agenda: whoever waits for it is never woken early, never late, and never forgotten."""

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retry_scheduler import agenda as agenda_module
from retry_scheduler.agenda import GRAIN_S, HORIZON_S, Agenda
from tests.virtual_time import pass_time, run_in_virtual_time

# Floating point: times of some thousand seconds in steps of a millionth.
SMALL_S = 1e-6

# (after how long, what is expected then to be due in how many seconds)
histories = st.lists(
    st.tuples(
        st.floats(min_value=0, max_value=2),
        st.lists(st.floats(min_value=-5, max_value=HORIZON_S), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=12,
)


@dataclass
class Observed:
    """What a sleeper saw."""

    due_at_s: list[float] = field(default_factory=list)
    woken_at_s: list[float] = field(default_factory=list)
    idle_at_s: list[float] = field(default_factory=list)


async def observe(history: list[tuple[float, list[float]]], longest_s: float) -> Observed:
    """Let one task expect what `history` says while another waits, and return what happened."""
    agenda, seen = Agenda(), Observed()
    loop = asyncio.get_running_loop()

    async def sleeper() -> None:
        while True:
            is_due = await agenda.wait(longest_s)
            (seen.woken_at_s if is_due else seen.idle_at_s).append(loop.time())
            await asyncio.sleep(0)  # noqa: TID251  lets others run, and waits for nothing

    sleeping = asyncio.create_task(sleeper())
    for pause_s, due_in_s in history:
        await pass_time(pause_s)
        agenda.expect(due_in_s)
        seen.due_at_s += [loop.time() + max(seconds, 0.0) for seconds in due_in_s]
    await pass_time(HORIZON_S + 1)
    sleeping.cancel()
    await asyncio.gather(sleeping, return_exceptions=True)
    return seen


@given(histories)
def test_everything_expected_wakes_the_sleeper_at_its_time_and_nothing_else_does(
    history: list[tuple[float, list[float]]],
) -> None:
    seen = run_in_virtual_time(observe(history, longest_s=1000), agenda_module)

    for due in seen.due_at_s:
        assert any(due - SMALL_S <= woken <= due + GRAIN_S + SMALL_S for woken in seen.woken_at_s), (
            "forgotten or late"
        )
    for woken in seen.woken_at_s:
        assert any(due - SMALL_S <= woken <= due + GRAIN_S + SMALL_S for due in seen.due_at_s), (
            "woken for nothing"
        )
    assert seen.idle_at_s == []


@given(histories, st.floats(min_value=0.01, max_value=1))
def test_the_longest_sleep_ends_without_anything_due_and_forgets_nothing(
    history: list[tuple[float, list[float]]], longest_s: float
) -> None:
    seen = run_in_virtual_time(observe(history, longest_s), agenda_module)

    for due in seen.due_at_s:
        assert any(due - SMALL_S <= woken <= due + GRAIN_S + SMALL_S for woken in seen.woken_at_s), (
            "forgotten or late"
        )
    moments = sorted([*seen.woken_at_s, *seen.idle_at_s])
    assert all(later - earlier <= longest_s + SMALL_S for earlier, later in pairwise(moments))


def test_a_later_time_does_not_delay_an_earlier_one_and_an_earlier_one_shortens_the_sleep() -> None:
    seen = run_in_virtual_time(observe([(0.0, [2.0]), (0.5, [0.1, 2.5])], longest_s=1000), agenda_module)

    assert seen.woken_at_s == pytest.approx([1000.6, 1002.0, 1003.0], abs=2 * GRAIN_S)


def test_many_retries_due_together_wake_the_sleeper_once_or_twice() -> None:
    seen = run_in_virtual_time(observe([(0.0, [1.0 + n * 1e-7 for n in range(10_000)])], 1000), agenda_module)

    assert 1 <= len(seen.woken_at_s) <= 2


def test_what_is_due_beyond_the_horizon_takes_no_memory() -> None:
    async def expect() -> int:
        agenda = Agenda()
        agenda.expect(HORIZON_S + n for n in range(1, 100_000))
        return len(agenda._times)

    assert run_in_virtual_time(expect(), agenda_module) == 0


def test_memory_is_bounded_by_the_horizon_however_much_is_expected() -> None:
    async def expect() -> int:
        agenda = Agenda()
        agenda.expect(n / 50_000 for n in range(150_000))
        return len(agenda._times)

    assert run_in_virtual_time(expect(), agenda_module) <= HORIZON_S / GRAIN_S + 2


def test_memory_is_bounded_while_nobody_waits_and_what_was_expected_still_wakes_at_once() -> None:
    async def expect() -> tuple[int, bool]:
        agenda = Agenda()
        for _ in range(3600):  # an hour of a blocked broker, with requests coming in
            agenda.expect(n * GRAIN_S for n in range(500))
            await pass_time(1)
        return len(agenda._times), await agenda.wait(longest_s=0)

    kept, is_due = run_in_virtual_time(expect(), agenda_module)

    assert kept <= HORIZON_S / GRAIN_S + 2
    assert is_due
