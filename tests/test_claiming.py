"""Claims on a real table: who gets which row, and whose settlement counts."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest

from chaos.proxy import Way, proxies
from retry_scheduler.database import SESSION, Database, DatabaseAddress
from retry_scheduler.errors import Unavailable
from retry_scheduler.messages import ClaimedQuarantine, ClaimedRetry, RetryRequest
from retry_scheduler.repository import LONG_AGO, Lease, Malformed, Release, Repository, Settlement
from retry_scheduler.schema import migrate
from retry_scheduler.sql import query
from tests import servers
from tests.factories import new_id
from tests.table import Table
from tests.waiting import eventually

NOW = timedelta(0)
A_MINUTE = timedelta(minutes=1)
LOOK_AHEAD = timedelta(seconds=3)
LARGE = 16_000_000


def address_of(database: servers.Database, *, port: int) -> DatabaseAddress:
    return DatabaseAddress(database.host, port, database.name, database.user, database.password, tls=False)


@pytest.fixture
async def repository(database: servers.Database) -> AsyncIterator[Repository]:
    opened = Database(address_of(database, port=database.port), pool_min=1, pool_max=4)
    await migrate(opened)
    await opened.open()
    yield Repository(opened)
    await opened.close()


@pytest.fixture
def table(database: servers.Database) -> Table:
    return Table(database)


def request(message_id: str, payload: bytes = b"x") -> RetryRequest:
    return RetryRequest(message_id, payload, "orders", "timeout", 0, 3, None)


async def store(repository: Repository, *payloads: bytes, delay: timedelta = NOW) -> list[str]:
    """Store one attempt after the other, so that the first is due first."""
    ids = [new_id() for _ in payloads]
    for message_id, payload in zip(ids, payloads, strict=True):
        await repository.store([request(message_id, payload)], [delay])
    return ids


async def instance(repository: Repository) -> UUID:
    owner = uuid4()
    await repository.join_instances(owner, "test")
    return owner


def lease(
    owner: UUID,
    *,
    rows: int = 100,
    size: int = 1_000_000,
    lasts: timedelta = A_MINUTE,
    floor: datetime = LONG_AGO,
    in_hand: Sequence[ClaimedRetry] = (),
) -> Lease:
    return Lease(owner, lasts, rows, size, floor, [task.id for task in in_hand])


def ids(tasks: list[ClaimedRetry]) -> set[str]:
    return {task.message_id for task in tasks}


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


async def test_a_claim_that_was_lost_with_its_answer_is_seen_by_the_next_look_of_its_owner(
    repository: Repository,
) -> None:
    owner = await instance(repository)
    await store(repository, b"1")
    lost = await repository.claim_due(lease(owner))

    known = await repository.beat(owner, LOOK_AHEAD, LONG_AGO, [task.id for task in lost])
    unknown = await repository.beat(owner, LOOK_AHEAD, LONG_AGO)

    assert known is not None and not known.due_now
    assert unknown is not None and unknown.due_now


async def test_rows_whose_claim_was_lost_with_its_answer_are_taken_back_by_their_owner_alone(
    repository: Repository,
) -> None:
    owner, other = await instance(repository), await instance(repository)
    stored = await store(repository, b"1", b"2")
    held = await repository.claim_due(lease(owner, rows=1))
    lost = await repository.claim_due(lease(owner, rows=1, in_hand=held))  # suppose that this never arrived

    theirs = await repository.claim_due(lease(other))
    found = await repository.claim_due(lease(owner, in_hand=held))

    assert theirs == []
    assert ids(found) == ids(lost) == {stored[1]}
    assert found[0].claims == lost[0].claims + 1


async def test_a_lease_of_somebody_whom_the_register_does_not_know_yet_is_respected(
    repository: Repository,
) -> None:
    alive = await instance(repository)
    await store(repository, b"1")
    await repository.claim_due(lease(uuid4()))  # what a claim sees that began before this one joined

    assert await repository.claim_due(lease(alive)) == []


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


async def test_the_rows_of_an_instance_that_has_left_the_register_are_free_at_once(
    repository: Repository,
) -> None:
    dead, alive = await instance(repository), await instance(repository)
    stored = await store(repository, b"1")
    await repository.claim_due(lease(dead))
    before = await repository.beat(alive, LOOK_AHEAD, LONG_AGO)

    assert await repository.bury_instances({dead: 0}) == ["test"]
    after = await repository.beat(alive, LOOK_AHEAD, LONG_AGO)
    taken_over = await repository.claim_due(lease(alive))

    assert before is not None and not before.due_now
    assert after is not None and after.due_now
    assert ids(taken_over) == set(stored)
    assert taken_over[0].claims_unsettled == 2


async def test_an_instance_whose_beat_has_moved_since_cannot_be_buried(repository: Repository) -> None:
    slow, observer = await instance(repository), await instance(repository)
    seen = await repository.beat(observer, LOOK_AHEAD, LONG_AGO)
    assert seen is not None
    await repository.beat(slow, LOOK_AHEAD, LONG_AGO)

    buried = await repository.bury_instances({slow: seen.beats[slow]})

    assert buried == []
    assert await repository.beat(slow, LOOK_AHEAD, LONG_AGO) is not None


async def test_a_buried_instance_learns_it_from_its_next_beat(repository: Repository) -> None:
    victim = await instance(repository)
    await repository.bury_instances({victim: 0})

    assert await repository.beat(victim, LOOK_AHEAD, LONG_AGO) is None


async def test_an_overtaken_owner_settles_and_gives_back_nothing(
    repository: Repository, table: Table
) -> None:
    slow, fast = await instance(repository), await instance(repository)
    await store(repository, b"1")
    (old,) = await repository.claim_due(lease(slow, lasts=NOW))
    (new,) = await repository.claim_due(lease(fast))

    settled_late = await repository.complete([Settlement(old.id, old.claims, "retried")])
    given_back_late = await repository.release([Release(old.id, old.claims, failures=1, delay=A_MINUTE)])
    settled = await repository.complete([Settlement(new.id, new.claims, "failed", "exhausted")])

    assert (settled_late, given_back_late, settled) == (set(), [], {new.id})
    row = await table.row("SELECT status, publish_failures FROM retry_queue")
    assert tuple(row) == ("failed", 0)


async def test_settling_again_after_a_lost_answer_counts_the_same_rows(repository: Repository) -> None:
    owner = await instance(repository)
    await store(repository, b"1", b"2")
    tasks = await repository.claim_due(lease(owner))
    settlements = [Settlement(task.id, task.claims, "retried") for task in tasks]

    first = await repository.complete(settlements)
    again = await repository.complete(settlements)

    assert first == again == {task.id for task in tasks}


async def test_malformed_input_is_settled_by_its_last_owner_alone_and_again_after_a_lost_answer(
    repository: Repository,
) -> None:
    slow, fast = await instance(repository), await instance(repository)
    await repository.quarantine([Malformed("body", "is not JSON", b"?", b"\0\0", False, n) for n in (1, 2)])
    overtaken = await repository.claim_quarantined(lease(slow, lasts=NOW))
    kept = await repository.claim_quarantined(lease(fast))

    too_late = await repository.complete_quarantined([_delivered(item) for item in overtaken])
    first = await repository.complete_quarantined([_delivered(item) for item in kept])
    again = await repository.complete_quarantined([_delivered(item) for item in kept])
    much_too_late = await repository.complete_quarantined([_delivered(item) for item in overtaken])

    assert (too_late, much_too_late) == (set(), set())
    assert first == again == {item.id for item in kept}
    assert len(first) == 2


def _delivered(item: ClaimedQuarantine) -> Settlement:
    return Settlement(item.id, item.claims, "delivered")


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


async def test_a_claim_that_nobody_reads_is_ended_and_its_rows_can_be_claimed_by_others(
    repository: Repository, table: Table, database: servers.Database
) -> None:
    """Until it has sent all of a claim, PostgreSQL holds its locks; a link that is silent takes nothing."""
    owner, other = await instance(repository), await instance(repository)
    stuck = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ClientWrite' AND datname = $1"
    with proxies(database.port) as (link,):
        cut_off = Database(address_of(database, port=link.port), pool_min=1, pool_max=1)
        await cut_off.open()
        silent = Repository(cut_off)
        await silent.claim_due(lease(owner))  # from now on the statement is prepared
        await store(repository, *[bytes(1_000_000)] * 10)
        link.hold(Way.TO_CLIENT)
        claiming = asyncio.create_task(silent.claim_due(lease(owner, size=LARGE)))
        await eventually(lambda: table.value(stuck, database.name))

        claimed = await eventually(lambda: repository.claim_due(lease(other, size=LARGE)))

        assert len(claimed) == 10
        with pytest.raises(Unavailable):
            await claiming
        await cut_off.close()
