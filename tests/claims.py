"""Rows and claims on a real table, for tests that do without a service."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID, uuid4

from retry_scheduler.database import DatabaseAddress
from retry_scheduler.messages import ClaimedRetry, RetryRequest
from retry_scheduler.repository import LONG_AGO, Lease, Repository
from tests import servers
from tests.factories import new_id

NOW = timedelta(0)
A_MINUTE = timedelta(minutes=1)
LOOK_AHEAD = timedelta(seconds=3)
LARGE = 16_000_000


def address_of(database: servers.Database, *, port: int) -> DatabaseAddress:
    return DatabaseAddress(database.host, port, database.name, database.user, database.password, tls=False)


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
