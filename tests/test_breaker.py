import pytest

from retry_scheduler.broker.breaker import (
    LATE_ANSWER_KEPT_S,
    LONGEST_HOLD_S,
    LOOKS_PER_S,
    PROBE_EVERY_S,
    SHORTEST_HOLD_S,
    Breaker,
)
from retry_scheduler.broker.confirms import Outcome

NOW_S = 1000.0


def hanging(*keys: str, queue: str = "orders") -> Breaker:
    """Return a breaker that knows these to be overdue since NOW_S, each sent under claim 1."""
    breaker = Breaker()
    for key in keys:
        breaker.overdue(key, 1, queue, NOW_S)
    return breaker


def test_what_is_outstanding_at_a_queue_that_hangs_is_not_sent_again() -> None:
    breaker = hanging("a")

    assert breaker.admit("a", 2, "orders", NOW_S + 1) is Outcome.HELD
    assert breaker.admit("a", 3, "orders", NOW_S + 10 * PROBE_EVERY_S) is Outcome.HELD


def test_one_of_the_others_is_sent_each_minute_as_a_probe() -> None:
    breaker = hanging("a")

    assert breaker.admit("b", 1, "orders", NOW_S + 1) is Outcome.HELD
    assert breaker.admit("b", 2, "orders", NOW_S + PROBE_EVERY_S) is None
    assert breaker.admit("c", 1, "orders", NOW_S + PROBE_EVERY_S + 1) is Outcome.HELD
    assert breaker.admit("c", 2, "orders", NOW_S + 2 * PROBE_EVERY_S) is None


def test_other_queues_are_not_concerned() -> None:
    breaker = hanging("a")

    assert breaker.admit("b", 1, "invoices", NOW_S) is None
    assert breaker.hold_s("invoices", NOW_S + 5, 0) == SHORTEST_HOLD_S
    assert breaker.hold_s("orders", NOW_S + 5, 0) == 2.5


def test_looks_at_what_is_held_become_rarer_with_the_time_up_to_a_bound() -> None:
    breaker = hanging("a")

    holds_s = [breaker.hold_s("orders", NOW_S + open_s, 0) for open_s in (0, 1, 8, 20, 300)]

    assert holds_s == [SHORTEST_HOLD_S, 0.5, 4, LONGEST_HOLD_S, LONGEST_HOLD_S]
    assert hanging("a").hold_s("orders", NOW_S + 8, 0.5) == 6


def test_however_much_is_held_for_several_queues_only_so_many_are_looked_at_in_a_second() -> None:
    breaker = hanging("a")
    breaker.overdue("b", 1, "invoices", NOW_S)
    held = 3 * int(LONGEST_HOLD_S * LOOKS_PER_S)

    holds_s = [
        breaker.hold_s(queue, NOW_S + 300, 0) for _ in range(held // 2) for queue in ("orders", "invoices")
    ]
    few_s = breaker.hold_s("orders", NOW_S + 400, 0)

    assert holds_s[0] == LONGEST_HOLD_S
    assert holds_s[-1] == pytest.approx((held - 1) / LOOKS_PER_S)
    assert few_s == LONGEST_HOLD_S


def test_on_another_connection_a_circuit_counts_as_open_from_its_first_probe_on() -> None:
    """Nobody may have had anything for its queue meanwhile: it may have been well for long."""
    breaker = hanging("a")
    breaker.connected(NOW_S + 10)

    assert breaker.admit("b", 1, "orders", NOW_S + 500) is None
    assert breaker.admit("c", 1, "orders", NOW_S + 501) is Outcome.HELD
    assert breaker.hold_s("orders", NOW_S + 501, 0) == 0.5


def test_a_late_answer_closes_the_circuit_and_is_known_to_the_next_claim() -> None:
    breaker = hanging("a", "b")

    assert breaker.answered("a", Outcome.CONFIRMED, NOW_S + 20) == "orders"
    assert breaker.answered("b", Outcome.RETURNED, NOW_S + 20) is None  # closed already

    assert breaker.hold_s("orders", NOW_S + 20, 0) == SHORTEST_HOLD_S
    assert breaker.admit("a", 2, "orders", NOW_S + 30) is Outcome.CONFIRMED
    assert breaker.admit("b", 2, "orders", NOW_S + 30) is Outcome.RETURNED
    assert breaker.admit("c", 1, "orders", NOW_S + 30) is None
    assert breaker.idle


def test_a_late_answer_is_known_after_the_row_was_held_several_times() -> None:
    breaker = hanging("a")
    for claim in (2, 3, 4):
        breaker.admit("a", claim, "orders", NOW_S + claim)

    breaker.answered("a", Outcome.CONFIRMED, NOW_S + 20)

    assert breaker.admit("a", 5, "orders", NOW_S + 30) is Outcome.CONFIRMED


def test_a_late_answer_says_nothing_once_another_instance_has_had_the_row() -> None:
    """It may have settled it, and an operator may want it to be sent once more."""
    breaker = hanging("a")
    breaker.answered("a", Outcome.CONFIRMED, NOW_S + 20)

    assert breaker.admit("a", 3, "orders", NOW_S + 30) is None


def test_a_late_answer_of_one_queue_says_nothing_of_another_to_which_the_row_goes_now() -> None:
    """To manual review, because its payload was deleted; or an operator has named another queue."""
    breaker = hanging("a")
    breaker.answered("a", Outcome.CONFIRMED, NOW_S + 20)

    assert breaker.admit("a", 2, "invoices", NOW_S + 30) is None


def test_a_probe_that_is_confirmed_closes_the_circuit() -> None:
    breaker = hanging("a")
    breaker.admit("b", 1, "orders", NOW_S + PROBE_EVERY_S)

    assert breaker.answered("b", Outcome.CONFIRMED, NOW_S + PROBE_EVERY_S) == "orders"
    assert breaker.admit("c", 1, "orders", NOW_S + PROBE_EVERY_S) is None
    # Its queue answers again, and this one has no answer: it was lost.
    assert breaker.admit("a", 2, "orders", NOW_S + PROBE_EVERY_S) is None


def test_answers_to_what_it_does_not_know_change_nothing() -> None:
    breaker = hanging("a")

    assert breaker.answered("x", Outcome.CONFIRMED, NOW_S) is None
    assert breaker.hold_s("orders", NOW_S + 1, 0) == 0.5


def test_a_new_connection_probes_each_open_circuit_at_once_and_has_nothing_outstanding() -> None:
    breaker = hanging("a")
    breaker.connected(NOW_S + 30)

    assert breaker.hold_s("orders", NOW_S + 31, 0) == 0.5
    assert breaker.admit("a", 2, "orders", NOW_S + 31) is None
    assert breaker.admit("b", 1, "orders", NOW_S + 31) is Outcome.HELD
    assert breaker.answered("a", Outcome.CONFIRMED, NOW_S + 31) == "orders"
    assert breaker.admit("b", 2, "orders", NOW_S + 32) is None
    assert breaker.idle


def test_a_late_answer_that_nobody_asks_for_is_forgotten() -> None:
    breaker = hanging("a")
    breaker.answered("a", Outcome.CONFIRMED, NOW_S + 1)

    breaker.overdue("b", 1, "orders", NOW_S + 2 + LATE_ANSWER_KEPT_S)
    breaker.answered("b", Outcome.CONFIRMED, NOW_S + 2 + LATE_ANSWER_KEPT_S)
    breaker.admit("b", 2, "orders", NOW_S + 2 + LATE_ANSWER_KEPT_S)

    assert breaker.idle


def test_a_queue_that_hangs_is_told_once() -> None:
    breaker = Breaker()

    assert breaker.suspect("orders", NOW_S)
    assert not breaker.suspect("orders", NOW_S)
    assert not breaker.overdue("a", 1, "orders", NOW_S)
    assert breaker.overdue("b", 1, "invoices", NOW_S)


def test_a_slow_queue_is_not_fed_until_it_confirms_something_and_nobody_is_told() -> None:
    breaker = Breaker()
    breaker.slow("a", "orders", NOW_S)
    breaker.slow("a", "orders", NOW_S + 1)

    assert breaker.hold_s("orders", NOW_S + 2, 0) == 1
    assert breaker.admit("b", 1, "orders", NOW_S + 2) is Outcome.HELD
    assert breaker.answered("a", Outcome.CONFIRMED, NOW_S + 3) is None
    assert breaker.admit("b", 2, "orders", NOW_S + 3) is None
    assert breaker.idle


def test_a_slow_queue_may_turn_out_to_hang() -> None:
    breaker = Breaker()
    breaker.slow("a", "orders", NOW_S)

    assert breaker.overdue("a", 1, "orders", NOW_S + 8)
    assert breaker.hold_s("orders", NOW_S + 8, 0) == 4
    assert breaker.answered("a", Outcome.CONFIRMED, NOW_S + 9) == "orders"
