"""Leases on a real table: how long a row is somebody's, and whose settlement counts."""

import asyncio
from uuid import uuid4

import pytest

from chaos.proxy import Way, proxies
from retry_scheduler.database import Database
from retry_scheduler.errors import Unavailable
from retry_scheduler.messages import ClaimedQuarantine
from retry_scheduler.repository import LONG_AGO, Malformed, Release, Repository, Settlement
from tests import servers
from tests.claims import A_MINUTE, LARGE, LOOK_AHEAD, NOW, address_of, ids, instance, lease, store
from tests.table import Table
from tests.waiting import eventually

pytest_plugins = ("tests.claim_fixtures",)


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


async def test_a_lease_of_an_instance_that_beats_does_not_run_out(repository: Repository) -> None:
    """A broker's alarm or an outage of PostgreSQL may last longer than any lease."""
    owner, other = await instance(repository), await instance(repository)
    await store(repository, b"1")
    held = await repository.claim_due(lease(owner, lasts=NOW))

    assert await repository.claim_due(lease(other)) == []
    assert await repository.claim_due(lease(owner, in_hand=held)) == []
    sighting = await repository.beat(owner, LOOK_AHEAD, LONG_AGO, [task.id for task in held])
    assert sighting is not None
    assert not sighting.due_now


async def test_a_lease_of_somebody_whom_the_register_never_knew_runs_out(repository: Repository) -> None:
    await store(repository, b"1")
    lost = await repository.claim_due(lease(uuid4(), lasts=NOW))

    assert ids(await repository.claim_due(lease(await instance(repository)))) == ids(lost)


async def test_giving_back_again_after_a_lost_answer_changes_nothing(
    repository: Repository, table: Table
) -> None:
    owner = await instance(repository)
    await store(repository, b"1")
    (task,) = await repository.claim_due(lease(owner))
    release = Release(task.id, task.claims, failures=1, error="returned", delay=A_MINUTE)
    await repository.release([release])
    before = await table.row("SELECT * FROM retry_queue")

    await repository.release([release])

    assert await table.row("SELECT * FROM retry_queue") == before
    assert before["publish_failures"] == 1


async def test_what_is_overdue_stays_so_while_it_is_held(repository: Repository, table: Table) -> None:
    owner = await instance(repository)
    await store(repository, b"1")
    for error in ("overdue", "held", "held"):
        (task,) = await repository.claim_due(lease(owner))
        await repository.release([Release(task.id, task.claims, error=error, delay=NOW)])

    assert await table.value("SELECT last_error FROM retry_queue") == "overdue"


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
    (old,) = await repository.claim_due(lease(slow))
    await repository.leave_instances(slow)
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
    overtaken = await repository.claim_quarantined(lease(slow))
    await repository.leave_instances(slow)
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
