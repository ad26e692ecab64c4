"""Two instances on one table: each message once; one of them may be stopped or killed at any moment."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from time import monotonic, time
from uuid import UUID, uuid4

import pytest

from tests.contract import LATE_AT_MOST_S, MOST_DUPLICATES
from tests.factories import make_request, new_id
from tests.service_process import ServiceProcess, StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, Message, Receiver, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)


Report = Callable[[str, object], None]


def executed(service: ServiceProcess) -> float:
    return service.metrics().value("retries_executed_total", status="success")


def extra_copies(messages: Sequence[Message]) -> int:
    """How many messages were duplicates, having made sure that a consumer could know each by its key."""
    ids_of_message: dict[str, set[str]] = {}
    for message in messages:
        ids_of_message.setdefault(message.message_id, set()).add(message.retry_id)
    assert all(len(ids) == 1 for ids in ids_of_message.values())
    return len(messages) - len(ids_of_message)


def spread_requests(ids: Sequence[str], *, over_s: float) -> list[bytes]:
    """Requests that are due one after another: however fast the service is, half-way is a moment to hit."""
    return [
        make_request(message_id=message_id, retry_after_ms=500 + int(over_s * 1000 * place / len(ids)))
        for place, message_id in enumerate(ids)
    ]


async def instance_id(table: Table, service: ServiceProcess) -> UUID:
    """The id under which an instance claims rows at this moment."""
    owner = await table.value(
        "SELECT id FROM retry_instance WHERE name LIKE '%:' || $1::text", str(service.pid)
    )
    return UUID(str(owner))


@pytest.mark.timeout(180)
async def test_20000_requests_through_two_instances_are_each_delivered_once(
    start_service: StartService, upstream: Upstream, table: Table, record_property: Report
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    ids = [new_id() for _ in range(20_000)]
    upstream.ask_for_many([make_request(message_id=message_id) for message_id in ids])
    began = monotonic()

    services = await asyncio.gather(*(start_service(RABBITMQ_PREFETCH="500") for _ in range(2)))
    await eventually(
        lambda: upstream.depth("orders") >= len(ids),
        within=timedelta(seconds=90),
        every=timedelta(seconds=0.2),
    )
    took_s = monotonic() - began
    await eventually(table.settled)
    delivered = Counter(message.retry_id for message in upstream.take("orders"))

    record_property("two_instances_retries_per_s", round(len(ids) / took_s))
    assert delivered == dict.fromkeys((f"{message_id}:0" for message_id in ids), 1)
    assert await table.statuses() == {"retried": len(ids)}
    shares = [executed(service) for service in services]
    assert sum(shares) == len(ids)
    assert min(shares) > len(ids) / 10
    for service in services:
        metrics = service.metrics()
        assert metrics.value("retry_publications_unknown_total") == 0
        assert metrics.value("retry_stale_completions_total") == 0
        assert metrics.value("retry_duplicates_total") == 0
    assert sum(service.metrics().value("retries_scheduled_total") for service in services) == len(ids)
    assert await asyncio.gather(*(service.stop() for service in services)) == [0, 0]
    assert await table.value("SELECT count(*) FROM retry_instance WHERE gone_at IS NULL") == 0
    assert upstream.depth("orders") == upstream.depth(RETRY_QUEUE) == 0


@pytest.mark.timeout(120)
async def test_sigterm_of_one_half_way_doubles_nothing_and_loses_nothing(
    start_service: StartService, upstream: Upstream, table: Table, record_property: Report
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    leaving, staying = await asyncio.gather(*(start_service(RABBITMQ_PREFETCH="100") for _ in range(2)))
    ids = [new_id() for _ in range(8000)]
    asking = asyncio.create_task(asyncio.to_thread(upstream.ask_for_many, spread_requests(ids, over_s=4)))
    await eventually(lambda: executed(leaving) > 500, within=timedelta(seconds=30))

    began = monotonic()
    exit_code = await leaving.stop()
    took_s = monotonic() - began
    left_over = len(ids) - upstream.depth("orders")
    await asking
    await upstream.filled("orders", len(ids), within=timedelta(seconds=60))
    await eventually(table.settled)
    delivered = Counter(message.retry_id for message in upstream.take("orders"))

    record_property("sigterm_took_s", round(took_s, 2))
    assert exit_code == 0
    assert took_s < 20
    assert left_over > 1000  # otherwise it was not half-way
    assert delivered == dict.fromkeys((f"{message_id}:0" for message_id in ids), 1)
    assert executed(staying) > 0
    # What the leaving one had in its hands was given back or finished, not left to be rescued.
    assert staying.metrics().value("retry_duplicates_total") == 0


@pytest.mark.timeout(120)
async def test_kill_9_of_one_half_way_loses_nothing_and_doubles_only_what_it_had_in_hand(
    start_service: StartService, upstream: Upstream, table: Table, record_property: Report
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    victim, survivor = await asyncio.gather(*(start_service(RABBITMQ_PREFETCH="200") for _ in range(2)))
    ids = [new_id() for _ in range(6000)]

    with Receiver(upstream, "orders") as receiver:
        upstream.ask_for_many(spread_requests(ids, over_s=2))
        await eventually(
            lambda: len(receiver) >= 1500, within=timedelta(seconds=30), every=timedelta(milliseconds=5)
        )
        victim.kill()
        received_before = len(receiver)
        owner = await instance_id(table, victim)
        rows = await table.fetch(
            "SELECT message_id FROM retry_queue WHERE status = 'pending' AND claimed_by = $1", owner
        )
        in_flight = {str(row["message_id"]) for row in rows}
        await eventually(
            lambda: len({message.message_id for message in receiver.messages}) == len(ids),
            within=timedelta(seconds=20),
            every=timedelta(milliseconds=100),
        )
        await eventually(table.settled, within=timedelta(seconds=10))
    messages = receiver.messages + upstream.take("orders")

    due = {
        str(row["message_id"]): row["next_retry_at"].timestamp()
        for row in await table.fetch("SELECT message_id, next_retry_at FROM retry_queue")
    }
    arrived = {
        message.message_id: message.received_at_s for message in reversed(messages)
    }  # the first copy counts
    late_s = {message_id: arrived[message_id] - due[message_id] for message_id in ids}
    duplicates = extra_copies(messages)
    record_property("killed_after_deliveries", received_before)
    record_property("in_flight_of_the_killed", len(in_flight))
    record_property("duplicates_after_kill", duplicates)
    record_property("latest_after_kill_s", round(max(late_s.values()), 2))
    assert received_before < len(ids) - 1000  # otherwise it was not half-way
    assert duplicates <= min(MOST_DUPLICATES, len(in_flight))
    assert min(late_s.values()) >= 0
    assert max(late_s.values()) <= LATE_AT_MOST_S
    assert await table.statuses() == {"retried": len(ids)}
    assert survivor.ready().status == 200


async def test_rows_that_a_killed_instance_had_claimed_and_not_sent_are_late_by_5_s_at_most(
    start_service: StartService, upstream: Upstream, table: Table, record_property: Report
) -> None:
    upstream.declare("orders")
    victim, survivor = await asyncio.gather(start_service(), start_service())
    upstream.ask_for_many([make_request(retry_after_ms=3_600_000) for _ in range(300)])
    await eventually(
        lambda: sum(one.metrics().value("retries_scheduled_total") for one in (victim, survivor)) == 300
    )
    owner = await instance_id(table, victim)

    # What the table looks like between a claim and the first byte to the broker: too short to hit.
    await table.fetch(
        "UPDATE retry_queue SET next_retry_at = clock_timestamp(), claimed_by = $1, claims = 1,"
        " claimed_until = clock_timestamp() + interval '40 s'",
        owner,
    )
    victim.kill()
    due_at_s = time()
    messages = await upstream.receive("orders", 300, within=timedelta(seconds=10))
    rescued_after_s = time() - due_at_s
    await eventually(table.settled)

    record_property("claimed_rows_rescued_after_s", round(rescued_after_s, 2))
    assert rescued_after_s <= LATE_AT_MOST_S
    assert extra_copies(messages) == 0
    assert await table.statuses() == {"retried": 300}


async def test_rows_of_an_instance_that_is_alive_are_left_to_it(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    upstream.declare("orders")
    other = await start_service()
    upstream.ask(make_request(retry_after_ms=3_600_000))
    await eventually(lambda: other.metrics().value("retries_scheduled_total") == 1)
    owner = uuid4()
    await table.fetch("INSERT INTO retry_instance (id, name) VALUES ($1, 'alive')", owner)
    others_beats = "SELECT beat FROM retry_instance WHERE id <> $1"
    began = await table.value(others_beats, owner)

    await table.fetch(
        "UPDATE retry_queue SET next_retry_at = clock_timestamp(), claimed_by = $1, claims = 1,"
        " claimed_until = clock_timestamp() + interval '40 s'",
        owner,
    )

    async def alive_for_six_looks() -> bool:
        await table.fetch("UPDATE retry_instance SET beat = beat + 1 WHERE id = $1", owner)
        return bool(await table.value(others_beats, owner) >= began + 6)

    await eventually(alive_for_six_looks, within=timedelta(seconds=10), every=timedelta(milliseconds=200))

    assert await table.statuses() == {"pending": 1}
    assert upstream.depth("orders") == 0
