"""`retry-scheduler status`: what an operator asks first, in a terminal and as JSON, also of a large table."""

import json
from typing import Any

import asyncpg
import pytest

from retry_scheduler.database import Database
from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.status import figures
from retry_scheduler.status.figures import Status, take_status
from retry_scheduler.status.text import report
from tests import servers
from tests.command import CONFIG, OK, UNAVAILABLE, Environment, call, settings_for
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

INSERT = """
INSERT INTO retry_queue (message_id, original_queue, retry_count, max_retries, next_retry_at, finished_at,
                         status, payload_bytes)
SELECT gen_random_uuid(), $2, 0, 3, now() + $4::text::interval, now() + $5::text::interval, $3, 0
  FROM generate_series(1, $1::int)
"""


@pytest.fixture
def environment(database: servers.Database, broker_url: str) -> Environment:
    return settings_for(database, broker_url)


async def insert(
    table: Table, count: int, queue: str, status: str, *, due: str = "0 s", finished: str | None = None
) -> None:
    """Store attempts. due, finished: from now, as PostgreSQL writes intervals."""
    await table.fetch(INSERT, count, queue, status, due, finished)


def as_json(environment: Environment, *, exit_code: int = OK) -> dict[str, Any]:
    done = call("status", "--json", **environment)
    assert (done.returncode, done.stderr) == (exit_code, "")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


async def test_status_counts_what_waits_what_is_due_what_is_late_and_who_works(
    environment: Environment, start_service: StartService, upstream: Upstream, table: Table
) -> None:
    await start_service(SERVICE_NAME="retries")
    upstream.ask(b"malformed")
    await eventually(
        lambda: table.value("SELECT count(*) FROM retry_quarantine WHERE delivered_at IS NOT NULL")
    )
    await insert(table, 3, "later", "pending", due="1 hour")
    # Somebody who is alive holds these: otherwise the service would execute them.
    await insert(table, 2, "invoices", "pending", due="-90 s")
    await table.fetch(
        "UPDATE retry_queue SET claimed_by = gen_random_uuid(), claimed_until = now() + interval '1 hour'"
        " WHERE original_queue = 'invoices'"
    )
    await insert(table, 4, "orders", "retried", due="-3 s", finished="-1 s")
    await insert(table, 5, "orders", "failed", due="-2 days", finished="-2 days")
    await insert(table, 1, "orders", "discarded", due="-2 days", finished="-2 days")

    taken = as_json(environment)
    text = call("status", **environment)

    stored = taken["stored"]
    assert taken["postgresql"] == taken["rabbitmq"] == {"up": True, "problem": None}
    assert taken["queues"] == [
        {"name": RETRY_QUEUE, "messages": 0, "consumers": 1},
        {"name": REVIEW_QUEUE, "messages": 1, "consumers": 0},
    ]
    assert stored["attempts"]["pending"] == 5
    assert stored["attempts"]["due"] == 2
    assert 90 <= stored["attempts"]["oldest_due_s"] < 120
    assert not stored["by_queue"]["estimated"]
    groups = {(group["queue"], group["status"]): group["attempts"] for group in stored["by_queue"]["groups"]}
    assert groups == {
        ("later", "pending"): 3,
        ("invoices", "pending"): 2,
        ("orders", "retried"): 4,
        ("orders", "failed"): 5,
        ("orders", "discarded"): 1,
    }
    late = stored["lateness"]
    assert late["executed"] == 4
    assert late["p50_s"] == late["max_s"] == pytest.approx(2)
    assert stored["review"] == {"quarantined": 1, "quarantine_waiting": 0}
    (instance,) = stored["instances"]
    assert instance["silent_s"] < 2.5
    assert stored["schema_version"] == 1
    tables = {each["name"]: each for each in stored["tables"]}
    assert {"retry_queue", "retry_payload", "retry_queue_archive", "retry_quarantine"} == tables.keys()
    assert tables["retry_queue"]["total_bytes"] > tables["retry_queue"]["index_bytes"] > 0
    assert "idx_retry_next_retry" in [index["name"] for index in stored["indexes"]]

    assert (text.returncode, text.stderr) == (OK, "")
    words = {line.split("  ")[0].strip(): " ".join(line.split()) for line in text.stdout.splitlines()}
    assert words["orders"] == "orders 0 4 5 1"
    assert words["pending"] == "pending 5"
    assert words["due now"].startswith("due now 2, the oldest for ")
    assert words["late"].startswith("late p50 2,000 ms, p99 2,000 ms, max 2,000 ms, of 4 executed")
    assert words[instance["name"]].endswith("beating")
    assert max(len(line) for line in text.stdout.splitlines()) < 120


async def test_a_server_that_is_away_is_part_of_the_answer_with_69(
    environment: Environment, opened: Database, table: Table
) -> None:
    (nobody,) = free_ports(1)
    broker_away = environment | {"RABBITMQ_URL": f"amqp://guest:secret1@{LOOPBACK}:{nobody}/"}
    database_away = environment | {"POSTGRES_PORT": str(nobody)}
    await insert(table, 1, "orders", "retried")

    without_broker = as_json(broker_away, exit_code=UNAVAILABLE)
    without_database = as_json(database_away, exit_code=UNAVAILABLE)
    neither = call("status", **(broker_away | {"POSTGRES_PORT": str(nobody)}))

    assert without_broker["stored"]["by_queue"]["groups"][0]["queue"] == "orders"
    assert (without_broker["rabbitmq"]["up"], without_broker["queues"]) == (False, None)
    assert (without_database["postgresql"]["up"], without_database["stored"]) == (False, None)
    assert without_database["queues"][0] == {"name": RETRY_QUEUE, "messages": None, "consumers": None}
    assert neither.returncode == UNAVAILABLE
    assert neither.stdout.count("AWAY") == 2
    assert "secret1" not in neither.stdout + neither.stderr


async def test_a_database_without_the_tables_is_told_with_78(environment: Environment) -> None:
    done = call("status", **environment)

    assert (done.returncode, done.stdout) == (CONFIG, "")
    assert 'relation "retry_queue" does not exist' in done.stderr


async def test_whoever_keeps_vacuum_from_cleaning_up_is_named(
    environment: Environment, opened: Database, database: servers.Database
) -> None:
    before = as_json(environment)
    foreign = await asyncpg.connect(database.dsn, server_settings={"application_name": "monthly report"})
    try:
        async with foreign.transaction(isolation="repeatable_read"):
            await foreign.fetchval("SELECT count(*) FROM retry_queue")
            during = as_json(environment)
    finally:
        await foreign.close()

    assert before["stored"]["oldest_transaction"]["who"] is None
    assert during["stored"]["oldest_transaction"]["who"].startswith("monthly report, process ")
    assert during["stored"]["oldest_transaction"]["open_s"] > 0


async def sample(opened: Database, broker_url: str) -> Status:
    return await take_status(opened, broker_url, (RETRY_QUEUE,), name="test")


async def test_a_large_table_is_sampled_and_says_so(
    opened: Database, broker_url: str, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    await insert(table, 9000, "orders", "retried")
    exact = await sample(opened, broker_url)
    monkeypatch.setattr(figures, "COUNTED_PAGES", 100)
    monkeypatch.setattr(figures, "SAMPLED_PAGES", 50)
    sampled = await sample(opened, broker_url)

    assert exact.stored is not None and sampled.stored is not None
    assert (exact.stored.by_queue.estimated, sampled.stored.by_queue.estimated) == (False, True)
    assert exact.stored.by_queue.groups[0].attempts == 9000
    # A fifth of the pages, taken at random: five standard deviations.
    assert sampled.stored.by_queue.groups[0].attempts == pytest.approx(9000, rel=0.6)
    assert "estimated from a sample" in report(sampled)


async def test_counts_end_at_their_limit_and_say_so(
    opened: Database, broker_url: str, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    await insert(table, 20, "orders", "pending", due="-1 s")
    monkeypatch.setattr(figures, "COUNT_UP_TO", 10)

    taken = await sample(opened, broker_url)

    assert taken.stored is not None
    assert (taken.stored.attempts.pending, taken.stored.attempts.due) == (10, 10)
    assert taken.stored.attempts.counted_up_to == 10
    assert "at least 10" in report(taken)


async def test_a_strangers_queue_name_cannot_steer_the_terminal(
    opened: Database, broker_url: str, table: Table
) -> None:
    await insert(table, 1, "\x1b[2Jorders\r\n", "retried")

    text = report(await sample(opened, broker_url))

    assert "orders" in text
    assert all(line.isprintable() for line in text.splitlines())


async def test_of_many_queues_the_largest_are_shown_and_the_others_counted(
    opened: Database, broker_url: str, table: Table
) -> None:
    for number in range(25):
        await insert(table, number + 1, f"queue-{number}", "retried")

    text = report(await sample(opened, broker_url))

    assert "queue-24" in text and "queue-0" not in text
    assert "and 5 queues more" in text
