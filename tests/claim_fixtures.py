"""Fixtures for tests of claims: a repository on a migrated database, and a look into it."""

from collections.abc import AsyncIterator

import pytest

from retry_scheduler.database import Database
from retry_scheduler.repository import Repository
from retry_scheduler.schema import migrate
from tests import servers
from tests.claims import address_of
from tests.table import Table


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
