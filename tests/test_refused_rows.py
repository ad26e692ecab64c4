"""Rows that PostgreSQL refuses, among others that it takes: each ends where it belongs.

No message can bring a refusal about; a constraint or a trigger that somebody adds to the table can.
"""

import json

import pytest

from retry_scheduler.demo.private_postgres import PrivatePostgres
from tests.factories import make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

# The server's refusal shows the row, or says nothing about it.
CONSTRAINT = "ALTER TABLE retry_queue ADD CONSTRAINT none_of_these CHECK (error_reason NOT LIKE 'bad%')"
TRIGGER = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'none of these' USING ERRCODE = 'invalid_parameter_value';
END $$;
CREATE TRIGGER refuse BEFORE INSERT ON retry_queue
    FOR EACH ROW WHEN (NEW.error_reason LIKE 'bad%') EXECUTE FUNCTION refuse();
"""


async def test_a_constraint_that_stored_rows_violate_stops_them_and_nothing_else_until_it_is_gone(
    start_service: StartService, upstream: Upstream, migrated: Table, postgres: PrivatePostgres
) -> None:
    upstream.declare("orders")
    service = await start_service()
    bad, good = new_id(), new_id()
    upstream.ask(make_request(message_id=bad, error_reason="bad", retry_after_ms=1000))
    await eventually(lambda: migrated.value("SELECT count(*) = 1 FROM retry_queue"))
    postgres.sql(f"{CONSTRAINT} NOT VALID", migrated.database.name)
    await eventually(lambda: service.log_events("Failed to get due retry tasks"))

    upstream.ask(make_request(message_id=good, retry_after_ms=0))
    await eventually(lambda: migrated.value("SELECT count(*) = 2 FROM retry_queue"))
    postgres.sql("ALTER TABLE retry_queue DROP CONSTRAINT none_of_these", migrated.database.name)
    received = await upstream.receive("orders", 2)
    await eventually(migrated.settled)

    assert sorted(message.message_id for message in received) == sorted([bad, good])
    assert await service.stop() == 0


@pytest.mark.parametrize("refusal", [CONSTRAINT, TRIGGER], ids=["constraint", "trigger"])
@pytest.mark.parametrize("bad_queue", ["orders", "invoices"])
async def test_what_postgresql_refuses_goes_to_people_and_nothing_else_does(
    start_service: StartService,
    upstream: Upstream,
    migrated: Table,
    postgres: PrivatePostgres,
    refusal: str,
    bad_queue: str,
) -> None:
    postgres.sql(refusal, migrated.database.name)
    upstream.declare("orders")
    service = await start_service()
    good, bad = [new_id() for _ in range(150)], [new_id() for _ in range(50)]
    requests = [make_request(message_id=each, original_queue="orders", retry_after_ms=0) for each in good]
    # The error text of a bad one names the good one behind it, and the server's refusal shows both.
    for place, each in reversed(list(enumerate(bad))):
        reason = f"bad, see {good[place]}"
        requests.insert(place, make_request(message_id=each, original_queue=bad_queue, error_reason=reason))
    upstream.ask_for_many(requests)

    received = await upstream.receive("orders", len(good))
    reviews = await upstream.receive(REVIEW_QUEUE, len(bad))
    await eventually(migrated.settled)

    assert sorted(message.message_id for message in received) == sorted(good)
    assert {review.review["reason"] for review in reviews} == {"malformed"}
    kept = await migrated.fetch("SELECT raw_body, reason FROM retry_quarantine")
    assert sorted(json.loads(row["raw_body"])["message_id"] for row in kept) == sorted(bad)
    assert all("PostgreSQL refuses a value" in row["reason"] for row in kept)
    assert "bad, see" not in service.log_text()
