"""The same attempt twice: nothing is executed twice or lost, and an upstream that cannot count ends."""

import asyncio
from collections import Counter
from datetime import timedelta

import pytest

from chaos.proxy import proxies
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.factories import make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.under_load import through
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

AN_HOUR_MS = 3_600_000


async def test_a_new_message_that_repeats_a_pending_attempt_changes_nothing(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service()
    message_id = new_id()
    upstream.ask(make_request(message_id=message_id, retry_after_ms=AN_HOUR_MS, error_reason="first"))
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == 1)
    before = await table.row("SELECT * FROM retry_queue JOIN retry_payload USING (id)")

    upstream.ask(
        make_request(
            message_id=message_id.upper(), original_payload="AAAA", error_reason="second", max_retries=9
        )
    )
    await eventually(lambda: service.metrics().value("retry_duplicates_total", kind="ignored") == 1)

    assert await table.row("SELECT * FROM retry_queue JOIN retry_payload USING (id)") == before
    (ignored,) = service.log_events("Duplicate request ignored")
    assert (ignored["message_id"], ignored["retry_count"]) == (message_id, 0)
    assert service.metrics().value("retries_scheduled_total") == 1


async def test_a_new_message_that_repeats_an_executed_attempt_becomes_the_next_one(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service()
    upstream.declare("orders")
    message_id = new_id()
    upstream.ask(make_request(message_id=message_id, retry_count=4, max_retries=10))
    await upstream.receive("orders", 1)
    await eventually(table.settled)

    upstream.ask(
        make_request(message_id=message_id, retry_count=4, max_retries=10, original_payload="YWdhaW4=")
    )
    (again,) = await upstream.receive("orders", 1)
    await eventually(table.settled)

    assert again.retry_id == f"{message_id}:5"
    assert again.headers["x-retry-count"] == 6
    assert again.body == b"again"
    rows = await table.fetch("SELECT retry_count, status FROM retry_queue ORDER BY retry_count")
    assert [tuple(row) for row in rows] == [(4, "retried"), (5, "retried")]
    assert service.metrics().value("retry_duplicates_total", kind="stored_as_next") == 1


@pytest.mark.parametrize(
    "way",
    [
        # Sent, and perhaps confirmed; not settled yet.
        "UPDATE retry_queue SET claims = 1, claimed_until = now() + interval '1 min',"
        " claimed_by = (SELECT id FROM retry_instance WHERE gone_at IS NULL)",
        # Sent to a queue that did not confirm in time, and has recovered: the late confirm settles it.
        "UPDATE retry_queue SET last_error = 'overdue'",
    ],
    ids=["in hand", "overdue"],
)
async def test_a_new_message_that_repeats_an_attempt_which_may_have_arrived_becomes_the_next_one(
    start_service: StartService, upstream: Upstream, table: Table, way: str
) -> None:
    """A consumer may fail, and ask again under the same number, before we have noted the confirm."""
    service = await start_service()
    upstream.declare("orders")
    message_id = new_id()
    upstream.ask(make_request(message_id=message_id, retry_after_ms=AN_HOUR_MS))
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == 1)
    await table.fetch(way)

    upstream.ask(make_request(message_id=message_id, retry_after_ms=0, original_payload="YWdhaW4="))
    (again,) = await upstream.receive("orders", 1)

    assert (again.retry_id, again.body) == (f"{message_id}:1", b"again")
    assert service.metrics().value("retry_duplicates_total", kind="stored_as_next") == 1


async def test_what_people_are_just_being_told_of_is_not_told_twice(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    """An exhausted attempt goes to nobody who could fail on it."""
    service = await start_service()
    message_id = new_id()
    upstream.ask(make_request(message_id=message_id, retry_after_ms=AN_HOUR_MS))
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == 1)
    await table.fetch(
        "UPDATE retry_queue SET max_retries = 0, claims = 1, claimed_until = now() + interval '1 min',"
        " claimed_by = (SELECT id FROM retry_instance WHERE gone_at IS NULL)"
    )

    upstream.ask(make_request(message_id=message_id))
    await eventually(lambda: service.metrics().value("retry_duplicates_total", kind="ignored") == 1)

    assert await table.value("SELECT count(*) FROM retry_queue") == 1


async def test_a_message_whose_upstream_never_counts_ends_in_manual_review(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service()
    upstream.declare("orders")
    message_id = new_id()
    body = make_request(message_id=message_id, retry_count=0, max_retries=3)

    for retry in range(3):
        upstream.ask(body)
        (message,) = await upstream.receive("orders", 1)
        assert message.headers["x-retry-count"] == retry + 1
        await eventually(table.settled)
    upstream.ask(body)
    (review,) = await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(table.settled)

    assert (review.review["retry_count"], review.review["reason"]) == (3, "exhausted")
    assert upstream.depth("orders") == 0
    assert await table.statuses() == {"retried": 3, "failed": 1}
    assert service.metrics().value("retry_duplicates_total") == 3
    assert service.metrics().value("retries_exhausted_total", queue="orders") == 1


async def test_repetitions_in_one_batch_are_each_given_a_number_of_their_own(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    executed, pending, counted = new_id(), new_id(), new_id()
    service = await start_service(RABBITMQ_PREFETCH="500")
    upstream.ask(
        make_request(message_id=executed, max_retries=9),
        make_request(message_id=pending, retry_after_ms=AN_HOUR_MS),
    )
    await upstream.receive("orders", 1)
    await eventually(lambda: service.metrics().value("retries_executed_total", status="success") == 1)
    await service.stop()
    upstream.ask_for_many(
        [
            *[make_request(message_id=executed, max_retries=9, error_reason=f"copy {n}") for n in (1, 2, 3)],
            *[make_request(message_id=pending, error_reason=f"copy {n}") for n in (1, 2)],
            *[make_request(message_id=counted, retry_count=n, max_retries=9) for n in (1, 0)],
        ]
    )

    service = await start_service(RABBITMQ_PREFETCH="500")
    delivered = await upstream.receive("orders", 5)
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0)
    await eventually(lambda: service.metrics().value("retry_duplicates_total", kind="ignored") == 2)

    # Each copy of the executed attempt is one more failure of that message.
    assert Counter(message.retry_id for message in delivered) == dict.fromkeys(
        [f"{executed}:1", f"{executed}:2", f"{executed}:3", f"{counted}:0", f"{counted}:1"], 1
    )
    reasons = await table.fetch(
        "SELECT error_reason FROM retry_queue WHERE message_id = $1 AND retry_count > 0 ORDER BY retry_count",
        executed,
    )
    assert [row["error_reason"] for row in reasons] == ["copy 1", "copy 2", "copy 3"]
    assert await table.value("SELECT count(*) FROM retry_queue WHERE message_id = $1", pending) == 1
    assert service.metrics().value("retry_duplicates_total", kind="stored_as_next") == 3
    assert service.metrics().value("retries_scheduled_total") == 5


async def test_hundreds_of_repetitions_at_once_are_stored_together_in_their_order(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(RABBITMQ_PREFETCH="500")
    upstream.declare("orders")
    message_id = new_id()
    upstream.ask(make_request(message_id=message_id, max_retries=1000))
    await upstream.receive("orders", 1)
    await eventually(table.settled)

    upstream.ask_for_many(
        [
            make_request(
                message_id=message_id, max_retries=1000, retry_after_ms=AN_HOUR_MS, error_reason=f"copy {n}"
            )
            for n in range(400)
        ]
    )
    await eventually(lambda: service.metrics().value("retry_duplicates_total", kind="stored_as_next") == 400)

    rows = await table.fetch(
        "SELECT retry_count, error_reason, xmin::text AS stored_by FROM retry_queue"
        " WHERE status = 'pending' ORDER BY retry_count"
    )
    assert [(row["retry_count"], row["error_reason"]) for row in rows] == [
        (n + 1, f"copy {n}") for n in range(400)
    ]
    # They come in several batches, and each of these is stored by one statement.
    assert len({row["stored_by"] for row in rows}) <= 40


async def test_the_highest_attempt_that_can_be_counted_has_no_next_one(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    await start_service()
    message_id = new_id()
    body = make_request(message_id=message_id, retry_count=2**31 - 1)
    upstream.ask(body)
    (exhausted,) = await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(table.settled)

    upstream.ask(body)
    (malformed,) = await upstream.receive(REVIEW_QUEUE, 1)

    assert exhausted.review["reason"] == "exhausted"
    assert malformed.review["reason"] == "malformed"
    assert malformed.review["error_reason"].startswith("retry_count: ")


async def test_what_the_broker_delivers_again_changes_nothing_pending_or_executed(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ
) -> None:
    """An instance that cannot acknowledge is simulated by another one: a consumer that takes and lets go."""
    service = await start_service()
    upstream.declare("orders")
    executed, pending = new_id(), new_id()
    bodies = [
        make_request(message_id=executed),
        make_request(message_id=pending, retry_after_ms=AN_HOUR_MS),
        b"{",
    ]
    upstream.ask(*bodies)
    await upstream.receive("orders", 1)
    (review,) = await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(lambda: service.metrics().value("retries_executed_total", status="success") == 1)
    counted = service.metrics()
    await service.stop()
    before = await table.fetch("SELECT * FROM retry_queue ORDER BY id")
    upstream.ask(*bodies)
    with upstream.channel() as channel:
        for _ in bodies:
            channel.basic_get(RETRY_QUEUE)  # never acknowledged: the broker will say "redelivered"

    service = await start_service()
    await eventually(lambda: service.metrics().value("retry_duplicates_total", kind="ignored") == 3)
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0)

    # Six were accepted, the malformed bytes twice: whose second copy it was nobody can tell.
    assert counted.value("retries_scheduled_total") == 2
    assert counted.value("retry_quarantined_total") == 1
    assert service.metrics().value("retries_scheduled_total") == 0
    assert service.metrics().value("retry_quarantined_total") == 0
    assert service.log_events("Malformed request quarantined") == []
    (ignored,) = [event for event in service.log_events("Duplicate request ignored") if "field" in event]
    assert (ignored["status"], ignored["field"], ignored["redelivered"]) == ("quarantined", "body", True)
    assert await table.fetch("SELECT * FROM retry_queue ORDER BY id") == before
    kept = await table.row("SELECT seen, delivered_at FROM retry_quarantine")
    assert kept["seen"] == 2
    assert upstream.depth("orders") == 0
    assert upstream.depth(REVIEW_QUEUE) == 0
    assert review.review["reason"] == "malformed"


@pytest.mark.parametrize("latency_s", [0.0, 0.2])
async def test_what_another_instance_has_executed_while_we_had_it_in_hand_is_not_executed_once_more(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    rabbitmq: PrivateRabbitMQ,
    vhost: str,
    latency_s: float,
) -> None:
    """Cut off from both servers, we cannot store it; the broker gives it to another instance, marked."""
    upstream.declare("orders", RETRY_QUEUE)
    with proxies(rabbitmq.port, table.database.port) as (to_rabbitmq, to_postgres):
        cut_off = await start_service(
            RABBITMQ_URL=through(to_rabbitmq, vhost), POSTGRES_PORT=str(to_postgres.port)
        )
        await start_service()
        to_postgres.refuse()
        upstream.ask(make_request(), make_request())  # one for each of them
        await eventually(lambda: cut_off.log_events("Failed to save retry task"))
        to_rabbitmq.refuse()
        await upstream.filled("orders", 2)
        await eventually(table.settled)
        to_postgres.heal()
        to_postgres.slow_down(latency_s=latency_s)
        await eventually(
            lambda: cut_off.metrics().value("retry_duplicates_total") == 1, within=timedelta(seconds=15)
        )

    assert cut_off.metrics().value("retry_duplicates_total", kind="ignored") == 1
    assert await table.statuses() == {"retried": 2}


async def test_two_instances_that_are_told_of_one_executed_attempt_store_each_repetition_once(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    services = await asyncio.gather(start_service(), start_service())
    upstream.declare("orders")
    ids = [new_id() for _ in range(20)]
    bodies = [make_request(message_id=message_id, max_retries=1000) for message_id in ids]
    upstream.ask_for_many(bodies)
    await upstream.receive("orders", len(ids))
    await eventually(table.settled)

    upstream.ask_for_many([body for body in bodies for _ in range(10)])
    delivered = await upstream.receive("orders", 10 * len(ids), within=timedelta(seconds=20))
    await eventually(table.settled)

    assert Counter(message.retry_id for message in delivered) == dict.fromkeys(
        [f"{message_id}:{count}" for message_id in ids for count in range(1, 11)], 1
    )
    assert await table.statuses() == {"retried": 11 * len(ids)}
    assert (
        sum(service.metrics().value("retry_duplicates_total", kind="stored_as_next") for service in services)
        == 200
    )


async def executed_by_another(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ
) -> str:
    """Have one request sent to the only instance, then its connection ended, and another execute it."""
    message_id = new_id()
    upstream.ask(make_request(message_id=message_id))
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0)
    rabbitmq.ctl("close_all_connections", "--global", "given to another")
    await start_service()
    await upstream.filled("orders", 1)
    await eventually(table.settled)
    return message_id


async def test_what_another_instance_has_executed_while_we_were_frozen_is_not_executed_once_more(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ
) -> None:
    """It lies unread in the frozen process's socket, and looks like a new message when that wakes up."""
    upstream.declare("orders", RETRY_QUEUE)
    frozen = await start_service()
    frozen.freeze()
    message_id = await executed_by_another(start_service, upstream, table, rabbitmq)

    frozen.thaw()
    await eventually(lambda: frozen.metrics().value("retry_duplicates_total", kind="ignored") == 1)

    assert await table.statuses() == {"retried": 1}
    assert [message.retry_id for message in upstream.take("orders")] == [f"{message_id}:0"]


async def test_what_came_while_we_were_frozen_is_the_next_attempt_if_the_broker_has_not_given_it_to_others(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    """An upstream that does not count sends it again, and both lie in our socket; another had the first."""
    upstream.declare("orders", RETRY_QUEUE)
    frozen, other = await asyncio.gather(start_service(), start_service())
    frozen.freeze()
    # The broker takes turns between its two consumers: each gets one of the two.
    body = make_request(message_id=new_id())
    upstream.ask(body, body)
    await upstream.filled("orders", 1)
    await eventually(lambda: other.metrics().value("retries_executed_total", status="success") == 1)

    frozen.thaw()

    await upstream.filled("orders", 2)
    await eventually(table.settled)
    assert await table.statuses() == {"retried": 2}
    assert frozen.metrics().value("retry_duplicates_total", kind="stored_as_next") == 1


async def test_what_another_instance_has_executed_while_it_was_on_its_way_to_us_is_not_executed_once_more(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ, vhost: str
) -> None:
    """On a slow link it arrives when the broker has long ended that connection; the end is behind it."""
    upstream.declare("orders", RETRY_QUEUE)
    with proxies(rabbitmq.port) as (to_rabbitmq,):
        far = await start_service(RABBITMQ_URL=through(to_rabbitmq, vhost))
        to_rabbitmq.slow_down(latency_s=3)
        message_id = await executed_by_another(start_service, upstream, table, rabbitmq)
        assert far.metrics().value("retry_duplicates_total") == 0, "it has not come yet"

        await eventually(lambda: far.metrics().value("retry_duplicates_total") == 1)

    assert far.metrics().value("retry_duplicates_total", kind="ignored") == 1
    assert await table.statuses() == {"retried": 1}
    assert [message.retry_id for message in upstream.take("orders")] == [f"{message_id}:0"]
