from retry_scheduler.broker.stalls import AFTERMATH_S, STALL_S, TICK_S, Stalls

NOW_S = 1000.0


def awake(seconds: float = 1.0) -> Stalls:
    """Return what has ticked until NOW_S."""
    stalls = Stalls(NOW_S - seconds)
    for tick in range(round(seconds / TICK_S), -1, -1):
        stalls.tick(NOW_S - tick * TICK_S)
    return stalls


def test_what_is_read_while_awake_has_just_come() -> None:
    assert awake().earliest_s(NOW_S + TICK_S) == NOW_S + TICK_S


def test_what_is_read_after_a_stall_may_have_come_when_it_began() -> None:
    assert awake().earliest_s(NOW_S + 7) == NOW_S


def test_it_does_not_matter_whether_the_timer_or_the_socket_comes_first_after_a_stall() -> None:
    stalls = awake()
    stalls.tick(NOW_S + 7)

    assert stalls.earliest_s(NOW_S + 7 + TICK_S) == NOW_S


def test_what_is_read_long_after_a_stall_has_just_come() -> None:
    stalls = awake()
    stalls.tick(NOW_S + 7)
    moment_s = NOW_S + 7
    while moment_s < NOW_S + 7 + AFTERMATH_S:
        moment_s += TICK_S
        stalls.tick(moment_s)

    assert stalls.earliest_s(moment_s) == moment_s


def test_a_tick_that_other_work_has_delayed_is_no_stall() -> None:
    assert awake().earliest_s(NOW_S + STALL_S - 0.01) == NOW_S + STALL_S - 0.01
