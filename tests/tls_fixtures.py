"""Fixtures of the tests that need TLS or passwords. A pytest plugin: modules name it in `pytest_plugins`."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from retry_scheduler.demo.processes import ServerMissing
from tests.broker_users import broker_user
from tests.servers import random_name, skip_or_fail
from tests.tls_servers import PASSWORD, Tenant, TlsServers


@pytest.fixture(scope="session")
def tls_servers() -> Iterator[TlsServers]:
    """Both servers, shared by the run. A test that lets them show another certificate changes it back."""
    folder = Path(tempfile.mkdtemp(prefix="retry-scheduler-tls-"))
    folder.chmod(0o711)  # run by root, PostgreSQL's user has to pass through
    servers = TlsServers(folder)
    try:
        servers.start()
        yield servers
    except ServerMissing as missing:
        skip_or_fail(missing)
    finally:
        servers.stop()
        shutil.rmtree(folder)


@pytest.fixture
def tenant(tls_servers: TlsServers) -> Iterator[Tenant]:
    """An empty database and an empty virtual host for this test alone."""
    name = random_name()
    tls_servers.postgres.create_role(name, PASSWORD)
    tls_servers.postgres.create_database(name, owner=name)
    tls_servers.rabbitmq.add_vhost(name)
    with broker_user(tls_servers.rabbitmq, name, name, PASSWORD, configure=".*", write=".*", read=".*"):
        yield Tenant(tls_servers, name)
    tls_servers.rabbitmq.delete_vhost(name)
    tls_servers.postgres.drop_database(name)
    tls_servers.postgres.sql(f"DROP ROLE {name}")
