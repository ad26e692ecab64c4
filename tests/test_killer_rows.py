"""Messages that are the death of the process: each ends with people, and takes no other one with it."""

import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from retry_scheduler.suspicion import UNPUBLISHABLE_AFTER, WITHOUT_PAYLOAD_AFTER
from tests.factories import PAYLOAD, encoded, make_request, new_id
from tests.failing_service import DEADLY_TO_CARRY, DEADLY_TO_READ, DEADLY_TO_RETRY, Failpoints
from tests.service_process import MakeService, ServiceProcess
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

LONG = timedelta(seconds=20)
OFTEN = timedelta(milliseconds=50)
DELIVERY_LIMIT = 3
AN_HOUR_MS = 3_600_000

# What an observer does to one whose beat stands still, without the 3 s until that is certain.
BURY_OTHERS = """
    UPDATE retry_instance SET gone_at = clock_timestamp()
     WHERE gone_at IS NULL AND name NOT LIKE '%:' || $1::text
"""

# What waits is seen at the next beat.
BEATING_FAST = {"RETRY_POLL_INTERVAL_MS": "100", "RABBITMQ_PREFETCH": "100"}


@dataclass
class Deadly:
    """A service that dies of some messages, and is started again."""

    service: ServiceProcess
    upstream: Upstream
    table: Table
    deaths: int = 0

    async def start(self) -> None:
        """Start it, and let it deliver something, so that it claims many rows at once; it may die of that.

        Only then it learns that the one before it is dead, and takes its rows over.
        """
        self.service.start()
        self.upstream.take("warm")
        self.upstream.ask(make_request(original_queue="warm"))
        await self.alive_until(self._warm)
        await self.table.fetch(BURY_OTHERS, str(self.service.pid))

    async def live_until(self, done: Callable[[], Awaitable[bool]], *, at_most: int) -> None:
        """Start it again each time it has died, until all is done. at_most: deaths."""
        while not await self.alive_until(done):
            self.deaths += 1
            assert self.deaths <= at_most, "the same messages kill it again and again"
            await self.start()

    async def alive_until(self, done: Callable[[], Awaitable[bool]]) -> bool:
        """Return whether it has lived to see it."""

        async def done_or_dead() -> bool:
            return not self.service.is_running or await done()

        await eventually(done_or_dead, within=LONG, every=OFTEN)
        return self.service.is_running

    async def _warm(self) -> bool:
        return self.upstream.depth("warm") > 0


@pytest.fixture
def deadly(make_service: MakeService, upstream: Upstream, table: Table, tmp_path: Path) -> Deadly:
    upstream.declare("orders", "warm")
    return Deadly(make_service(**BEATING_FAST, **Failpoints(tmp_path).settings), upstream, table)


@pytest.mark.timeout(180)
async def test_rows_that_kill_the_process_go_to_people_and_the_others_in_hand_arrive_once(
    deadly: Deadly, upstream: Upstream, table: Table
) -> None:
    upstream.declare(RETRY_QUEUE)
    others, killer, worse = [new_id() for _ in range(40)], new_id(), new_id()
    bodies = [make_request(message_id=message_id, retry_after_ms=AN_HOUR_MS) for message_id in others]
    for message_id, reason in ((killer, DEADLY_TO_RETRY), (worse, DEADLY_TO_CARRY)):
        body = make_request(message_id=message_id, error_reason=reason, retry_after_ms=AN_HOUR_MS)
        bodies.insert(0, body)
    await deadly.start()
    upstream.ask_for_many(bodies)
    waiting = "SELECT count(*) = $1 FROM retry_queue WHERE status = 'pending'"
    await eventually(lambda: table.value(waiting, len(bodies)), within=LONG)

    await table.fetch("UPDATE retry_queue SET next_retry_at = clock_timestamp() WHERE status = 'pending'")
    await deadly.live_until(table.settled, at_most=UNPUBLISHABLE_AFTER + WITHOUT_PAYLOAD_AFTER)
    reviews = {message.review["message_id"]: message.review for message in upstream.take(REVIEW_QUEUE)}
    delivered = Counter(message.message_id for message in upstream.take("orders"))

    assert deadly.deaths >= WITHOUT_PAYLOAD_AFTER
    assert delivered == dict.fromkeys(others, 1)
    assert reviews.keys() == {killer, worse}
    assert {review["reason"] for review in reviews.values()} == {"unpublishable"}
    assert reviews[killer]["original_payload"] == encoded(PAYLOAD)
    assert reviews[worse]["original_payload"] is None


@pytest.mark.timeout(120)
async def test_malformed_input_that_kills_the_process_goes_to_people_without_its_payload_and_the_rest_with_it(
    deadly: Deadly, upstream: Upstream, table: Table
) -> None:
    upstream.declare(RETRY_QUEUE)
    malformed = [DEADLY_TO_CARRY.encode(), *(f"malformed {n}".encode() for n in range(20))]
    await deadly.start()
    upstream.ask_for_many(malformed)

    async def all_moved() -> bool:
        moved = "SELECT count(*) FROM retry_quarantine WHERE delivered_at IS NOT NULL"
        return bool(await table.value(moved) == len(malformed))

    await deadly.live_until(all_moved, at_most=WITHOUT_PAYLOAD_AFTER)
    payloads = Counter(message.review["original_payload"] for message in upstream.take(REVIEW_QUEUE))

    assert payloads.keys() == {None} | {encoded(body) for body in malformed[1:]}
    assert payloads[None] == 1


@pytest.mark.timeout(120)
async def test_a_request_that_kills_the_process_while_it_is_read_is_set_aside_by_a_delivery_limit(
    make_service: MakeService, upstream: Upstream, table: Table, tmp_path: Path
) -> None:
    """Before it is read, only the broker knows it. What had been sent to us with it is set aside, too."""
    upstream.declare("orders", "unreadable")
    upstream.declare(
        RETRY_QUEUE,
        x_queue_type="quorum",
        x_delivery_limit=DELIVERY_LIMIT,
        x_dead_letter_exchange="",
        x_dead_letter_routing_key="unreadable",
    )
    service = make_service(RABBITMQ_PREFETCH="10", **Failpoints(tmp_path).settings)
    others, killer = [new_id() for _ in range(60)], new_id()
    bodies = [make_request(message_id=message_id) for message_id in others]
    bodies.insert(30, make_request(message_id=killer, error_reason=DEADLY_TO_READ))
    upstream.ask_for_many(bodies)

    service.start()
    deaths = 0

    def all_are_somewhere() -> bool:
        nonlocal deaths
        if not service.is_running:
            deaths += 1
            service.start()
        return upstream.depth("orders") + upstream.depth("unreadable") == len(bodies)

    await eventually(all_are_somewhere, within=2 * LONG)
    set_aside = {json.loads(message.body)["message_id"] for message in upstream.take("unreadable")}
    delivered = {message.message_id for message in upstream.take("orders")}

    assert deaths == DELIVERY_LIMIT + 1
    assert killer in set_aside
    assert len(set_aside) <= 10
    assert delivered == set(others) - set_aside
