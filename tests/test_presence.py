"""Who is alive: nobody is buried who moves or whom nobody could see, and the dead are found in time."""

from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retry_scheduler.presence import BEAT_EVERY, FENCE_AFTER, STILL_AFTER, STILL_LOOKS, Presence

A, B = UUID(int=1), UUID(int=2)

# Looks of one observer: seconds since the last look, and which beats it sees (None: not in the register).
looks = st.lists(
    st.tuples(
        st.floats(min_value=0.01, max_value=5),
        st.fixed_dictionaries({A: st.none() | st.integers(0, 2), B: st.none() | st.integers(0, 2)}),
    ),
    max_size=15,
)


def standing(history: list[tuple[float, int | None]], now_s: float) -> bool:
    """The rule, said once more and as simply as possible, for one instance's history of (time, beat)."""
    last = history[-1][1]
    if last is None:
        return False
    run_of_same: list[float] = []
    for at_s, beat in reversed(history):
        if beat != last:
            break
        run_of_same.insert(0, at_s)
    unmoved_looks = len(run_of_same) - 1
    return unmoved_looks >= STILL_LOOKS and now_s - run_of_same[0] >= STILL_AFTER.total_seconds()


@given(looks, st.floats(min_value=0, max_value=10))
def test_an_instance_stands_still_exactly_if_enough_looks_over_enough_time_saw_it_unmoved(
    seen: list[tuple[float, dict[UUID, int | None]]], wait_s: float
) -> None:
    presence, now_s = Presence(), 0.0
    history: dict[UUID, list[tuple[float, int | None]]] = {A: [], B: []}

    for pause_s, beats in seen:
        now_s += pause_s
        presence.observe({id_: beat for id_, beat in beats.items() if beat is not None}, now_s)
        for id_ in (A, B):
            history[id_].append((now_s, beats[id_]))
        expected = {id_: beats[id_] for id_ in (A, B) if standing(history[id_], now_s + wait_s)}
        assert presence.still(now_s + wait_s) == expected


def test_an_instance_that_stops_beating_is_found_within_4_looks() -> None:
    presence = Presence()
    for second in range(10):
        presence.observe({A: second}, float(second))

    found_after_s = None
    for look in range(1, 10):
        presence.observe({A: 9}, 9.0 + look * BEAT_EVERY.total_seconds())
        if found_after_s is None and presence.still(9.0 + look):
            found_after_s = look

    assert found_after_s == 3
    assert presence.still(20.0) == {A: 9}


@pytest.mark.parametrize("stall_s", [3.0, 60.0, 86_400.0])
def test_an_observer_that_stalled_buries_nobody(stall_s: float) -> None:
    """Its own pause looks like everybody's silence; only looks that saw no movement may count."""
    presence = Presence()
    presence.observe({A: 1, B: 1}, 0.0)

    presence.observe({A: 1, B: 1}, stall_s)
    presence.observe({A: 2, B: 1}, stall_s + 1)

    assert presence.still(stall_s + 1) == {}


def test_the_database_standing_still_buries_nobody() -> None:
    presence = Presence()
    presence.observe({A: 5}, 0.0)

    assert presence.still(3600.0) == {}


def test_one_that_moves_again_or_leaves_is_not_still() -> None:
    presence = Presence()
    for second in range(6):
        presence.observe({A: 1, B: 1}, float(second))
    assert presence.still(6.0) == {A: 1, B: 1}

    presence.observe({A: 2}, 7.0)

    assert presence.still(100.0) == {}


def test_an_instance_is_fenced_before_anybody_else_may_bury_it() -> None:
    presence = Presence()
    assert presence.fenced(0.0)  # it has not joined yet

    presence.beaten(10.0)

    assert not presence.fenced(10.0 + FENCE_AFTER.total_seconds())
    assert presence.fenced(10.0 + FENCE_AFTER.total_seconds() + 0.001)
    assert FENCE_AFTER < STILL_AFTER


def test_a_renewed_instance_has_another_id_and_may_not_publish_before_its_first_beat() -> None:
    presence = Presence()
    presence.beaten(1.0)
    before = presence.id

    presence.renew()

    assert presence.id != before
    assert presence.fenced(1.0)
    presence.beaten(2.0)
    assert not presence.fenced(2.0)


def test_ids_are_never_the_same() -> None:
    assert len({Presence().id for _ in range(100)} | {uuid4()}) == 101
