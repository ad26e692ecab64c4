import pytest

from retry_scheduler.broker.size_limit import SizeLimit


@pytest.mark.parametrize(
    "said",
    [
        "406 PRECONDITION_FAILED - message size 64000 is larger than configured max size 50000",
        "406 PRECONDITION_FAILED - message size 64000 is larger than max size 50000",
    ],
)
def test_the_limit_that_the_broker_names_holds_for_what_is_larger(said: str) -> None:
    limit = SizeLimit()
    assert limit.admits(10**9), "nothing is known yet"

    assert limit.learn(said) == 50_000

    assert limit.admits(50_000)
    assert not limit.admits(50_001)


def test_another_reason_says_nothing_about_sizes() -> None:
    limit = SizeLimit()

    assert limit.learn("406 PRECONDITION_FAILED - unknown delivery tag 7") is None

    assert limit.admits(10**9)


def test_what_is_confirmed_shows_that_the_limit_was_raised() -> None:
    limit = SizeLimit()
    limit.learn("406 PRECONDITION_FAILED - message size 64000 is larger than configured max size 50000")

    limit.confirmed(50_000)
    assert not limit.admits(50_001), "that was below the limit"

    limit.confirmed(50_001)
    assert limit.admits(64_000)
