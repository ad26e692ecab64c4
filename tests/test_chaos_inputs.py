"""What the chaos test does to the service: its schedule and its requests, drawn from a seed."""

import random
from collections import Counter
from typing import get_args

import pytest

from chaos.faults import DEADLY_POINTS, FAULTS
from chaos.requests import MIX, QUEUES, SPOILERS, Request, RequestMix, make_request
from chaos.schedule import HORIZON, LASTS_S, PIN_HORIZON, Strike, random_schedule, target_of
from retry_scheduler.errors import MalformedRequest
from retry_scheduler.failpoints import Point
from retry_scheduler.messages import RetryRequest, parse_request
from tests.factories import PAYLOAD, new_id

LONG_S = 1800.0


def read(request: Request) -> RetryRequest:
    return parse_request(request.body, own_queues=frozenset(), default_max_retries=3)


def test_one_seed_draws_one_schedule_and_another_seed_another() -> None:
    assert random_schedule(1, 300, 2) == random_schedule(1, 300, 2)
    assert random_schedule(1, 300, 2) != random_schedule(2, 300, 2)


def test_a_schedule_has_every_fault_at_most_two_at_a_time_and_never_two_against_one_target() -> None:
    strikes = [strike for strike in random_schedule(1, LONG_S, 3) if strike.fault != PIN_HORIZON]

    def together(one: Strike, other: Strike) -> bool:
        return one.at_s <= other.at_s + other.lasts_s and other.at_s <= one.at_s + one.lasts_s

    for strike in strikes:
        beside = [other for other in strikes if other is not strike and together(strike, other)]
        assert target_of(strike.fault) not in {target_of(other.fault) for other in beside}
        assert len(beside) <= 1
        assert strike.at_s + strike.lasts_s <= LONG_S
        assert strike.instance in range(3)
    assert {strike.fault for strike in strikes} == set(FAULTS) - {PIN_HORIZON}
    assert any(together(one, other) for one in strikes for other in strikes if one is not other)


def test_one_old_transaction_is_open_through_the_middle_of_a_schedule() -> None:
    (pinned,) = [strike for strike in random_schedule(1, LONG_S, 3) if strike.fault == PIN_HORIZON]

    assert target_of(pinned.fault) == HORIZON
    assert 0 < pinned.at_s < LONG_S / 2 < pinned.at_s + pinned.lasts_s < LONG_S


def test_every_fault_of_the_schedule_can_be_inflicted() -> None:
    assert {PIN_HORIZON, *(fault for faults in LASTS_S.values() for fault in faults)} == set(FAULTS)


def test_an_instance_dies_only_at_points_that_there_are() -> None:
    assert set(DEADLY_POINTS) <= set(get_args(Point))


def test_one_seed_draws_the_same_messages() -> None:
    def ids() -> list[str | None]:
        mix = RequestMix(random.Random("seed"))
        return [request.message_id for _ in range(200) for request in mix.next()]

    assert ids() == ids()


def test_the_mix_is_well_formed_but_for_what_is_meant_to_be_malformed() -> None:
    mix = RequestMix(random.Random("seed"))
    requests = [request for _ in range(2000) for request in mix.next()]

    for request in requests:
        if request.kind == "malformed":
            with pytest.raises(MalformedRequest):
                read(request)
        else:
            parsed = read(request)
            assert parsed.attempt == (request.message_id, request.retry_count)
            assert parsed.retry_after_ms == request.least_delay_ms
    assert Counter(request.kind for request in requests).keys() == MIX.keys()


@pytest.mark.parametrize("spoil", SPOILERS)
def test_everything_that_spoils_a_request_makes_it_malformed_and_marks_it(spoil) -> None:  # type: ignore[no-untyped-def]
    good = [make_request("valid", message_id=new_id(), payload=PAYLOAD, queue=QUEUES[0]) for _ in range(2)]

    spoilt = [Request("malformed", spoil(each.body, new_id().encode())) for each in good]

    for each in spoilt:
        with pytest.raises(MalformedRequest):
            read(each)
    assert spoilt[0].body != spoilt[1].body
