"""A large payload that PostgreSQL does not deliver holds up its own row, and nothing is held against that."""

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import cast

from retry_scheduler.agenda import Agenda
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.errors import Unavailable
from retry_scheduler.messages import ClaimedRetry
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.presence import Presence
from retry_scheduler.releases import without_payload
from retry_scheduler.repository import Lease, Repository
from retry_scheduler.scheduler import Scheduler
from retry_scheduler.settlement import Settler
from retry_scheduler.supervision import Progress
from retry_scheduler.suspicion import ALONE_AFTER, WITHOUT_PAYLOAD_AFTER
from retry_scheduler.transfer import LARGE_BYTES
from tests.factories import new_id
from tests.waiting import eventually

LOST, LARGE, SMALL, GIVEN_UP = range(1, 5)


def row(row_id: int, *, size: int, unsettled: int) -> ClaimedRetry:
    payload = b"x" if size <= LARGE_BYTES else None
    return ClaimedRetry(
        row_id, 1, new_id(), "orders", None, 0, 3, 0, unsettled, None, None, payload, size, 0.0, more=False
    )


class Rows:
    """A repository that lends suspected rows, once, and cannot deliver the payload of LOST."""

    def __init__(self) -> None:
        self.asked_for: list[int] = []

    async def claim_due(self, _: Lease) -> list[ClaimedRetry]:
        return [
            row(LOST, size=LARGE_BYTES + 1, unsettled=ALONE_AFTER + 1),
            row(LARGE, size=LARGE_BYTES + 1, unsettled=ALONE_AFTER + 1),
            row(SMALL, size=1, unsettled=ALONE_AFTER + 1),
            row(GIVEN_UP, size=LARGE_BYTES + 1, unsettled=WITHOUT_PAYLOAD_AFTER + 1),
        ]

    async def payload(self, task: ClaimedRetry) -> bytes:
        self.asked_for.append(task.id)
        if task.id == LOST:
            raise Unavailable("PostgreSQL", "no answer in time")
        return b"large"


class Taken:
    """A settler that keeps what it is given."""

    def __init__(self) -> None:
        self.delivered: dict[int, bytes | None] = {}
        self.given_back: list[int] = []

    async def deliver(
        self,
        tasks: Sequence[ClaimedRetry],
        _: float,
        *,
        still_ours: Callable[[], bool],
        on_settled: Callable[[Iterable[ClaimedRetry]], None],
    ) -> None:
        assert still_ours()
        self.delivered |= {task.id: task.payload for task in tasks}
        on_settled(tasks)

    async def give_back_without_payload(self, tasks: Sequence[ClaimedRetry]) -> None:
        self.given_back += [task.id for task in tasks]


async def test_only_the_row_whose_payload_does_not_come_waits_and_none_is_asked_for_in_vain() -> None:
    rows, taken, presence = Rows(), Taken(), Presence()
    presence.beaten(time.monotonic())
    scheduler = Scheduler(
        cast(Repository, rows),
        PublishLink("amqp://nowhere", queues=(), name="test", on_problem=lambda problem: None),
        cast(Settler, taken),
        Agenda(),
        presence,
        Metrics(),
        name="test",
        poll_interval=timedelta(seconds=1),
        progress=Progress(),
    )

    await scheduler.run_once()
    await eventually(lambda: taken.delivered)

    assert taken.delivered == {LARGE: b"large", SMALL: b"x", GIVEN_UP: None}
    assert taken.given_back == [LOST]
    assert rows.asked_for == [LOST, LARGE]


def test_a_payload_that_does_not_come_is_no_evidence_against_its_row() -> None:
    """What was known before this claim remains; another try comes soon, and not for all at once."""
    task = row(LOST, size=LARGE_BYTES + 1, unsettled=4)

    releases = [without_payload(task) for _ in range(20)]

    assert {release.unsettled for release in releases} == {3}
    delays = {release.delay for release in releases if release.delay is not None}
    assert min(delays) >= timedelta(seconds=5)
    assert max(delays) <= timedelta(seconds=10)
    assert len(delays) > 10
