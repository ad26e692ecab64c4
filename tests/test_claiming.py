"""Claims on a real table: who gets which row, and in which order."""

from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from retry_scheduler.database import SESSION
from retry_scheduler.repository import LONG_AGO, Repository
from retry_scheduler.sql import query
from tests import servers
from tests.claims import A_MINUTE, LOOK_AHEAD, NOW, ids, instance, lease, request, store
from tests.factories import new_id
from tests.table import Table

pytest_plugins = ("tests.claim_fixtures",)


async def test_what_one_instance_holds_is_passed_over_by_the_other(repository: Repository) -> None:
    first, second = await instance(repository), await instance(repository)
    stored = await store(repository, b"1", b"2", b"3")

    mine = await repository.claim_due(lease(first, rows=2))
    theirs = await repository.claim_due(lease(second))

    assert ids(mine) == set(stored[:2])
    assert ids(theirs) == {stored[2]}


async def test_nothing_is_claimed_before_it_is_due(repository: Repository) -> None:
    owner = await instance(repository)
    await store(repository, b"1", delay=A_MINUTE)

    assert await repository.claim_due(lease(owner)) == []


async def test_a_claim_takes_as_many_bytes_as_fit_and_at_least_one_row(repository: Repository) -> None:
    owner = await instance(repository)
    stored = await store(repository, b"x" * 600, b"x" * 300, b"x" * 300)

    first = await repository.claim_due(lease(owner, size=500))
    second = await repository.claim_due(lease(owner, size=500, in_hand=first))
    third = await repository.claim_due(lease(owner, size=500, in_hand=first + second))

    assert [ids(first), ids(second), ids(third)] == [{stored[0]}, {stored[1]}, {stored[2]}]


@pytest.mark.parametrize(
    ("rows", "size", "claimed", "more"),
    [
        pytest.param(2, 10_000, 2, True, id="cut short by rows"),
        pytest.param(9, 1_000, 2, True, id="cut short by bytes, however few they are"),
        pytest.param(9, 10_000, 3, False, id="all that is due"),
    ],
)
async def test_a_claim_says_whether_more_is_due_than_it_could_lend(
    repository: Repository, rows: int, size: int, claimed: int, more: bool
) -> None:
    owner = await instance(repository)
    await store(repository, b"x", b"x", b"x" * 5000)

    tasks = await repository.claim_due(lease(owner, rows=rows, size=size))

    assert (len(tasks), {task.more for task in tasks}) == (claimed, {more})


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("complete", "bigint[], integer[], text[], text[]"),
        ("release", "bigint[], integer[], integer[], text[], interval[], integer[]"),
        ("suspect", "bigint[], integer[], integer[]"),
        ("complete_quarantined", "bigint[], integer[]"),
        ("suspect_quarantined", "bigint[], integer[], integer[]"),
        ("release_quarantined", "bigint[], integer[], integer[], text[], interval[], integer[]"),
        ("attempt_states", "uuid[], integer[]"),
        ("stored_intakes", "uuid[], bigint[]"),
    ],
)
@pytest.mark.usefixtures("repository")
async def test_the_plan_made_on_an_empty_table_does_not_walk_what_is_pending(
    database: servers.Database, name: str, types: str
) -> None:
    """A prepared statement keeps its plan while the table fills: with the wrong one, a backlog wedges us."""
    connection = await asyncpg.connect(database.dsn, server_settings=SESSION)
    try:
        await connection.execute("SET plan_cache_mode = force_generic_plan")
        await connection.execute(f"PREPARE it ({types}) AS {query(name)}")
        nothing = ", ".join("NULL" for _ in types.split(","))
        plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN EXECUTE it ({nothing})"))
    finally:
        await connection.close()

    assert "idx_retry_next_retry" not in plan
    assert "idx_retry_quarantine_waiting" not in plan
    assert "Seq Scan" not in plan


async def test_a_delivery_is_found_again_whose_storing_was_lost_with_its_answer(
    repository: Repository,
) -> None:
    first, other = request(new_id()), request(new_id())
    first.intake_id, other.intake_id = 17, 18
    stored = await repository.store([first], [NOW])

    found = await repository.stored_intakes([first, other])

    assert list(found) == [17]
    assert found[17][0] == first.attempt
    assert found[17][1].next_retry_at == stored[first.attempt].next_retry_at


async def test_payloads_left_over_from_a_restored_backup_make_nothing_malformed(
    repository: Repository, table: Table
) -> None:
    owner = await instance(repository)
    await table.fetch("INSERT INTO retry_payload SELECT n, 'old' FROM generate_series(1, 10) AS n")

    await store(repository, b"new")

    (task,) = await repository.claim_due(lease(owner))
    assert task.payload == b"new"


async def test_truncating_the_queue_removes_its_payloads(repository: Repository, table: Table) -> None:
    await store(repository, b"1")

    await table.fetch("TRUNCATE retry_queue RESTART IDENTITY")

    assert await table.value("SELECT count(*) FROM retry_payload") == 0


async def test_a_row_without_its_payload_is_claimed_too_so_that_it_cannot_be_stuck(
    repository: Repository, table: Table
) -> None:
    owner = await instance(repository)
    await store(repository, b"1")
    await table.fetch("DELETE FROM retry_payload")

    (task,) = await repository.claim_due(lease(owner))

    assert task.payload is None


async def test_below_the_floor_nothing_is_searched_and_the_floor_lies_below_everything_pending(
    repository: Repository, table: Table
) -> None:
    owner = await instance(repository)
    stored = await store(repository, b"1", b"2")
    await table.fetch("UPDATE retry_queue SET next_retry_at = '2020-01-01Z' WHERE message_id = $1", stored[0])
    above = datetime(2021, 1, 1, tzinfo=UTC)

    with_floor = await repository.claim_due(lease(owner, floor=above))
    floor = await repository.search_floor(LONG_AGO)
    raised = await repository.search_floor(above)
    rest = await repository.claim_due(lease(owner, floor=floor, in_hand=with_floor))

    assert ids(with_floor) == {stored[1]}
    assert floor == datetime(2020, 1, 1, tzinfo=UTC) - timedelta(seconds=10)
    assert raised > above  # what lies below is not looked at
    assert ids(rest) == {stored[0]}


async def test_the_floor_of_an_empty_table_leaves_room_for_what_is_being_stored(
    repository: Repository, table: Table
) -> None:
    floor = await repository.search_floor(LONG_AGO)
    now = await table.value("SELECT clock_timestamp()")

    assert timedelta(seconds=10) <= now - floor < timedelta(seconds=15)


async def test_a_look_tells_what_is_coming_soon_and_nothing_later(repository: Repository) -> None:
    owner = await instance(repository)
    await store(repository, b"1", delay=timedelta(seconds=2))
    await store(repository, b"2", delay=A_MINUTE)

    sighting = await repository.beat(owner, LOOK_AHEAD, LONG_AGO)

    assert sighting is not None and not sighting.due_now
    assert len(sighting.coming_s) == 1
    assert 1 < sighting.coming_s[0] <= 2.002
