"""The three disasters of the runbook, on servers that are really lost, its commands followed as they stand.

Beforehand everything happens that makes recovering hard: rows in hand, requests that wait, messages sent
after the backup and others lost with it. Afterwards every message is accounted for.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.observability.events import PAUSED
from tests.command import settings_for
from tests.contract import MOST_DUPLICATES
from tests.factories import make_request, new_id
from tests.runbook_operator import Operator
from tests.servers import Database
from tests.service_process import MakeService
from tests.table import Table
from tests.under_load import copies
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

Report = Callable[[str, object], None]

AN_HOUR_MS = 3_600_000
RECOVERED = timedelta(seconds=20)

NOW_DUE = """
    UPDATE retry_queue SET next_retry_at = now() WHERE status = 'pending' AND message_id = ANY ($1::uuid[])
"""
IN_HAND = "SELECT count(*) FROM retry_queue WHERE status = 'pending' AND claimed_until > now()"
HOLDERS = IN_HAND.replace("*", "DISTINCT claimed_by")


@pytest.fixture
def folder() -> Iterator[Path]:
    """For servers that a test loses. PostgreSQL's own user can pass through."""
    made = Path(tempfile.mkdtemp(prefix="retry-scheduler-tests-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def lost_postgres(folder: Path) -> Iterator[PrivatePostgres]:
    """A server of this test's own, with the names that the documents use."""
    with PrivatePostgres(folder / "postgres") as server:
        server.create_role("eracun", "secret")
        server.create_database("eracun", owner="eracun")
        yield server


def ids(count: int) -> list[str]:
    return [new_id() for _ in range(count)]


def requests(message_ids: list[str], **fields: Any) -> list[bytes]:
    return [make_request(message_id=each, **fields) for each in message_ids]


async def reached(table: Table, **statuses: int) -> None:
    """Wait until so many attempts stand in each state, and none in another."""

    async def as_said() -> bool:
        return await table.statuses() == statuses

    await eventually(as_said, within=RECOVERED)


@pytest.mark.timeout(120)
async def test_after_a_crash_of_all_instances_nothing_is_lost_and_each_duplicate_is_explained(
    make_service: MakeService,
    postgres: PrivatePostgres,
    rabbitmq: PrivateRabbitMQ,
    upstream: Upstream,
    table: Table,
    tmp_path: Path,
    record_property: Report,
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    operator = Operator(tmp_path, make_service, postgres, table.database.name, RABBITMQ_PREFETCH="200")
    await operator.start(machines=2)
    before, pending, meanwhile, exhausted = ids(200), ids(3 * MOST_DUPLICATES), ids(20), ids(3)
    upstream.ask_for_many(requests(before))  # who has delivered is trusted with more than one at a time
    upstream.ask_for_many(requests(pending, retry_after_ms=AN_HOUR_MS))
    await reached(table, retried=len(before), pending=len(pending))

    rabbitmq.freeze()  # it takes what is sent to it and confirms nothing: the rows stay in hand
    await table.fetch(NOW_DUE, pending)
    await eventually(lambda: table.value(f"SELECT ({HOLDERS}) = 2 AND ({IN_HAND}) > {MOST_DUPLICATES}"))
    in_hand = await table.value(IN_HAND)
    for service in operator.services:
        service.kill()
    rabbitmq.thaw()
    upstream.ask(b"malformed", *requests(meanwhile), *requests(exhausted, max_retries=0))

    await operator.follow("8.1", "Look why")
    await operator.follow("8.1", "Start it")
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0, within=RECOVERED)
    await reached(table, retried=len(before + pending + meanwhile), failed=len(exhausted))
    await eventually(table.settled)
    caught_up = await operator.follow("8.1", "See that it catches up")
    explained = await operator.follow("8.1", "What may have come twice")

    messages = upstream.take("orders")
    came = Counter(message.retry_id for message in messages)
    listed = {":".join(line.split("|")[:2]) for line in explained.splitlines()}
    record_property("in_hand", in_hand)
    record_property("duplicates", copies(messages))
    assert came.keys() == {f"{each}:0" for each in before + pending + meanwhile}
    assert {retry_id for retry_id, times in came.items() if times > 1} <= listed
    assert len(listed) >= in_hand
    assert listed.isdisjoint(f"{each}:0" for each in meanwhile)
    assert copies(messages) <= 2 * MOST_DUPLICATES
    reasons = Counter(message.review["reason"] for message in upstream.take(REVIEW_QUEUE))
    assert reasons == {"malformed": 1, "exhausted": len(exhausted)}
    assert "due now" in caught_up
    assert operator.left_out("8.1") == []


@pytest.mark.timeout(120)
async def test_a_restored_database_sends_what_was_pending_once_it_is_released_and_names_what_is_lost(
    make_service: MakeService,
    lost_postgres: PrivatePostgres,
    broker_url: str,
    upstream: Upstream,
    folder: Path,
    tmp_path: Path,
) -> None:
    database = Database(lost_postgres.host, lost_postgres.port, "eracun", "eracun", "secret")
    table = Table(database)
    upstream.declare("orders")
    operator = Operator(tmp_path, make_service, lost_postgres, "eracun", **settings_for(database, broker_url))
    await operator.start()
    before, sent_since, pending = ids(2), ids(3), ids(4)
    upstream.ask(*requests(before))
    upstream.ask(*requests(sent_since + pending, retry_after_ms=AN_HOUR_MS))
    await reached(table, retried=2, pending=7)
    await operator.follow("8.4", "PostgreSQL")

    await table.fetch(NOW_DUE, sent_since)
    only_in_between, lost, waiting = ids(2), ids(2), ids(3)
    upstream.ask(*requests(only_in_between), *requests(lost, retry_after_ms=AN_HOUR_MS))
    await reached(table, retried=2 + 3 + 2, pending=4 + 2)
    lost_postgres.stop()
    shutil.rmtree(folder / "postgres")
    first_copies = upstream.take("orders")

    await operator.follow("8.2", "Stop every instance")
    upstream.ask(*requests(waiting))
    operator.postgres = PrivatePostgres(folder / "new", port=lost_postgres.port)
    with operator.postgres:
        checked = await operator.follow("8.2", "Restore")
        await table.fetch(NOW_DUE, sent_since + pending)  # as if restoring had taken hours
        await operator.follow("8.2", "Start paused")
        (service,) = operator.services
        due = len(sent_since + pending + waiting)
        await eventually(lambda: service.ready().body["paused"]["due"] == due, within=RECOVERED)
        looked = await operator.follow("8.2", "Look what would be sent")
        unsent = [upstream.depth("orders"), await table.value("SELECT sum(claims) FROM retry_queue")]
        since = {"2026-01-31 13:55": "today"}
        await operator.follow("8.2", "Read the log since the backup into the database", since)
        discarded = await operator.follow("8.2", "Discard what has been sent since")
        await operator.follow("8.2", "Release")
        await eventually(table.settled, within=RECOVERED)
        again = upstream.take("orders")
        named = await operator.follow("8.2", "What is lost")
        await operator.follow("8.2", "Tidy up")
        await service.wait_until_ready()
        assert await service.stop() == 0
        more = upstream.take("orders")
        statuses = await table.statuses()

    assert sorted(message.message_id for message in first_copies) == sorted(
        before + sent_since + only_in_between
    )
    assert "WRONG" not in checked
    assert f"paused: {due} retries would be sent at once" in looked
    assert PAUSED in looked
    assert unsent == [0, len(before)]  # claimed before the backup
    assert discarded == f"orders|{len(sent_since)}\n"
    assert sorted(message.message_id for message in again) == sorted(pending + waiting)
    assert more == []
    assert sorted(line.split("|")[0] for line in named.splitlines()) == sorted(lost)
    assert statuses == {"retried": len(before + pending + waiting), "discarded": len(sent_since)}
    assert operator.file("/etc/eracun/retry-scheduler.env").read_text() == ""
    assert operator.left_out("8.2") == []
    assert operator.left_out("8.4") == ["RabbitMQ"]


@pytest.mark.timeout(150)
async def test_what_a_broker_that_has_lost_everything_had_is_found_in_the_table_but_for_what_was_not_stored(
    make_service: MakeService, postgres: PrivatePostgres, table: Table, folder: Path, tmp_path: Path
) -> None:
    with PrivateRabbitMQ(folder / "rabbitmq") as rabbitmq:
        rabbitmq.ctl("add_user", "retry_service", "hidden")
        rabbitmq.ctl("set_permissions", "retry_service", ".*", ".*", ".*")
        upstream = Upstream(rabbitmq.url())
        upstream.declare("orders")
        settings = {"RABBITMQ_URL": rabbitmq.url().replace("guest:guest", "retry_service:hidden")}
        operator = Operator(tmp_path, make_service, postgres, table.database.name, **settings)
        operator.rabbitmq = rabbitmq
        await operator.follow("8.4", "RabbitMQ")  # the service's own queues are not in it
        await operator.start()
        (service,) = operator.services
        began = datetime.now(UTC)
        sent, consumed, exhausted, pending, waiting = ids(5), new_id(), new_id(), ids(5), ids(30)
        upstream.ask(*requests([*sent, consumed]), *requests([exhausted], max_retries=0), b"malformed")
        await reached(table, retried=6, failed=1)
        await eventually(lambda: table.value("SELECT delivered_at IS NOT NULL FROM retry_quarantine"))
        upstream.ask(*requests([consumed], retry_count=1, retry_after_ms=AN_HOUR_MS))
        upstream.ask(*requests(pending, retry_after_ms=AN_HOUR_MS))
        await reached(table, retried=6, failed=1, pending=6)
        postgres.freeze()  # requests that cannot be stored wait at the broker
        upstream.ask(*requests(waiting))

        rabbitmq.kill()
        shutil.rmtree(folder / "rabbitmq" / "data")
        rabbitmq.start()
        postgres.thaw()
        await table.fetch(NOW_DUE, pending)  # while the broker does not know the service
        await eventually(lambda: "ACCESS_REFUSED" in service.log_text(), within=RECOVERED)
        came_back = datetime.now(UTC)
        await operator.follow("8.3", "Give the broker back its users, rights and queues")
        await service.wait_until_ready()
        last = new_id()
        upstream.ask(*requests([last]))  # stored after whatever of the others the service had in hand
        await eventually(
            lambda: table.value(f"SELECT count(*) = 1 FROM retry_queue WHERE message_id = '{last}'")
        )
        await eventually(lambda: table.value("SELECT count(*) = 1 FROM retry_queue WHERE status = 'pending'"))
        went_on = await operator.follow("8.3", "See that it goes on")
        went_out = Counter(message.message_id for message in upstream.take("orders"))

        period = {"2026-01-31 13:00Z": began.isoformat(), "2026-01-31 14:10Z": came_back.isoformat()}
        looked = await operator.follow("8.3", "What was sent and perhaps not consumed", period)
        await operator.follow("8.3", "Send it again", period)
        await operator.follow("8.3", "Fill manual review again", period)
        again = await upstream.receive("orders", len(sent))
        reviews = await upstream.receive(REVIEW_QUEUE, 2)
        asked = [*sent, consumed, exhausted, *pending, *waiting]
        operator.file("/tmp/asked.csv").write_text("".join(f"{each},0\n" for each in asked))
        missing = await operator.follow("8.3", "What is lost")
        assert await service.stop() == 0
        more = upstream.take("orders") + upstream.take(REVIEW_QUEUE)

    lost = {line.split("|")[0] for line in missing.splitlines()}
    assert lost
    assert lost < set(waiting)
    assert went_out == Counter([*pending, *(set(waiting) - lost), last])
    assert f"{RETRY_QUEUE}\t0\t1" in went_on
    assert looked.startswith(f"orders|{len(sent) + 1}|")
    assert sorted(message.message_id for message in again) == sorted(sent)  # not what was clearly consumed
    assert {message.review["reason"] for message in reviews} == {"exhausted", "malformed"}
    assert more == []
    assert operator.left_out("8.3") == []
    assert operator.left_out("8.4") == ["PostgreSQL"]
