"""What an outcome means for a row, a counter and a span: nothing unsent is told of as sent, or as unknown."""

from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import timedelta
from typing import Any, cast

import pytest

from retry_scheduler.agenda import Agenda
from retry_scheduler.backoff import BackoffPolicy
from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.messages import ClaimedRetry
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.publisher import Publisher, Wave
from retry_scheduler.releases import Releases
from retry_scheduler.repository import Release, Repository, Settlement, Suspicion
from retry_scheduler.settlement import Settler
from retry_scheduler.suspicion import ALONE_AFTER
from tests.factories import new_id

POLICY = BackoffPolicy(base=timedelta(seconds=1), cap=timedelta(minutes=1), jitter=timedelta(0))

PERHAPS_DELIVERED = {Outcome.UNKNOWN, Outcome.OVERDUE, Outcome.SUSPECT}


class GivenOutcomes:
    """A publisher that sends nothing and answers at once, one outcome for each row."""

    def __init__(self, *outcomes: Outcome) -> None:
        self._outcomes = outcomes

    def hold(self, *_: object) -> timedelta:
        return timedelta(seconds=1)

    async def publish(self, *_: object) -> AsyncIterator[Wave]:
        yield list(enumerate(self._outcomes))


class Settled:
    """A repository in which every row is still ours."""

    async def complete(self, settlements: Sequence[Settlement]) -> set[int]:
        return {each.id for each in settlements}

    async def suspect(self, suspicions: Sequence[Suspicion]) -> None:
        pass

    async def release(self, releases: Sequence[Release]) -> list[float]:
        return [60.0 for _ in releases]


class Spans:
    """A tracing that keeps what it is told."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def published(self, *, outcome: str, **_: object) -> None:
        self.outcomes.append(outcome)


def row(number: int = 1) -> ClaimedRetry:
    return ClaimedRetry(
        number, 1, new_id(), "orders", None, 0, 3, 0, 1, None, None, b"x", 1, late_s=0.0, more=False
    )


def settler(metrics: Metrics, spans: Spans, *outcomes: Outcome) -> Settler:
    return Settler(
        cast(Repository, Settled()),
        cast(Publisher, GivenOutcomes(*outcomes)),
        Agenda(),
        metrics,
        policy=POLICY,
        max_publish_failures=10,
        tracing=cast(Any, spans),
    )


def unknown(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("retry_publications_unknown_total") or 0.0


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_only_what_may_have_been_delivered_is_counted_as_unknown(outcome: Outcome) -> None:
    metrics = Metrics()

    await settler(metrics, Spans(), outcome).deliver(
        [row()], 0.0, still_ours=lambda: True, on_settled=lambda _: None
    )

    assert unknown(metrics) == (1 if outcome in PERHAPS_DELIVERED else 0)


async def test_what_was_not_sent_leaves_no_span() -> None:
    spans = Spans()
    rows = [row(number) for number in range(len(Outcome))]
    settled: list[ClaimedRetry] = []

    def note(put_down: Iterable[ClaimedRetry]) -> None:
        settled.extend(put_down)

    await settler(Metrics(), spans, *Outcome).deliver(rows, 0.0, still_ours=lambda: True, on_settled=note)

    assert set(spans.outcomes) == {
        each.value for each in Outcome if each not in (Outcome.NOT_SENT, Outcome.HELD)
    }
    assert settled == rows


def test_what_cannot_be_sent_comes_back_soon_and_under_suspicion() -> None:
    releases = Releases(cast(Publisher, GivenOutcomes()), Metrics(), policy=POLICY, max_publish_failures=10)

    release = releases.after(row(), None, Outcome.UNSENDABLE)

    assert release.delay is not None
    assert timedelta(seconds=1) <= release.delay <= timedelta(seconds=2)
    assert (release.unsettled, release.failures, release.error) == (ALONE_AFTER, 0, "unsendable")
