"""How long attempts wait: 2, 4, 8, 16 s, never more than the cap and the jitter, for any count."""

import doctest
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retry_scheduler import backoff
from retry_scheduler.backoff import (
    MAX_RETRY_AFTER,
    MIN_REPUBLISH_DELAY,
    BackoffPolicy,
    delay_asked_for,
    delay_before_republish,
    delay_before_retry,
)

DEFAULT = BackoffPolicy(base=timedelta(seconds=2), cap=timedelta(seconds=60), jitter=timedelta(seconds=1))

days_ms = st.integers(min_value=0, max_value=86_400_000).map(lambda ms: timedelta(milliseconds=ms))
policies = st.builds(BackoffPolicy, base=days_ms, cap=days_ms, jitter=days_ms)
counts = st.integers(min_value=0, max_value=2**31 - 1)
rolls = st.floats(min_value=0, max_value=1, exclude_max=True)


@pytest.mark.parametrize(
    ("count", "seconds"), [(0, 2), (1, 4), (2, 8), (3, 16), (4, 32), (5, 60), (6, 60), (10**9, 60)]
)
def test_the_default_delays_are_2_4_8_and_16_s_up_to_a_minute_and_a_second_of_jitter(
    count: int, seconds: int
) -> None:
    assert delay_before_retry(count, DEFAULT, roll=0.0) == timedelta(seconds=seconds)
    assert delay_before_retry(count, DEFAULT, roll=0.5) == timedelta(seconds=seconds + 0.5)


@given(counts, policies, rolls)
def test_a_delay_is_never_below_its_base_or_cap_nor_above_both_and_the_jitter(
    count: int, policy: BackoffPolicy, roll: float
) -> None:
    delay = delay_before_retry(count, policy, roll)

    assert min(policy.base, policy.cap) <= delay <= policy.cap + policy.jitter
    assert delay >= timedelta(0)


@given(counts, counts, policies)
def test_without_jitter_more_retries_never_wait_shorter(one: int, other: int, policy: BackoffPolicy) -> None:
    fewer, more = sorted((one, other))

    assert delay_before_retry(fewer, policy, 0.0) <= delay_before_retry(more, policy, 0.0)


@given(st.integers(min_value=0, max_value=30), policies)
def test_the_delay_doubles_until_it_meets_the_cap(count: int, policy: BackoffPolicy) -> None:
    doubled_us = policy.base // timedelta(microseconds=1) * 2**count  # a timedelta would overflow
    expected_us = min(doubled_us, policy.cap // timedelta(microseconds=1))
    assert delay_before_retry(count, policy, 0.0) == timedelta(microseconds=expected_us)


def test_a_negative_count_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="counts from 0"):
        delay_before_retry(-1, DEFAULT, 0.0)


@given(st.integers(min_value=0, max_value=10**40))
def test_a_wait_that_is_asked_for_is_granted_up_to_24_hours(milliseconds: int) -> None:
    assert delay_asked_for(milliseconds) == timedelta(milliseconds=min(milliseconds, 86_400_000))
    assert timedelta(hours=24) == MAX_RETRY_AFTER


@given(st.integers(min_value=1, max_value=10**6), policies, rolls)
def test_what_could_not_be_published_is_never_tried_again_at_once(
    failures: int, policy: BackoffPolicy, roll: float
) -> None:
    delay = delay_before_republish(failures, policy, roll)

    assert MIN_REPUBLISH_DELAY <= delay <= max(policy.cap + policy.jitter, MIN_REPUBLISH_DELAY)


@given(counts, policies, rolls)
def test_jitter_only_adds_and_in_proportion_to_the_roll(
    count: int, policy: BackoffPolicy, roll: float
) -> None:
    added = delay_before_retry(count, policy, roll) - delay_before_retry(count, policy, 0.0)

    assert abs(added - policy.jitter * roll) <= timedelta(microseconds=1)


@given(st.integers(min_value=1, max_value=10**6), policies)
def test_the_more_publications_fail_the_longer_the_next_one_waits(
    failures: int, policy: BackoffPolicy
) -> None:
    before = delay_before_republish(failures, policy, 0.0)

    assert before <= delay_before_republish(failures + 1, policy, 0.0)
    assert before == max(delay_before_retry(failures - 1, policy, 0.0), MIN_REPUBLISH_DELAY)


def test_the_examples_in_the_documentation_are_right() -> None:
    result = doctest.testmod(backoff)

    assert result.attempted > 0
    assert result.failed == 0
