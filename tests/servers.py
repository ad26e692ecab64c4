"""The real servers that the tests share, and the names that keep one test's data from another's."""

import os
import secrets
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import pytest

from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.demo.processes import ServerMissing

SERVICE_ROLE = "service"
SERVICE_PASSWORD = "it's secret"  # the quote makes sure that nobody pastes it into SQL

Server = TypeVar("Server", PrivatePostgres, PrivateRabbitMQ)


@dataclass(frozen=True)
class Database:
    """An empty database, and the role that owns it."""

    host: str
    port: int
    name: str
    user: str = SERVICE_ROLE
    password: str = SERVICE_PASSWORD

    @property
    def dsn(self) -> str:
        """The address without the password; the server asks for none."""
        return f"postgresql://{self.user}@{self.host}:{self.port}/{self.name}"


class SharedServers:
    """One PostgreSQL and one RabbitMQ for the whole run, started side by side and only where needed."""

    def __init__(self, *, with_postgres: bool, with_rabbitmq: bool) -> None:
        self._with_postgres = with_postgres
        self._with_rabbitmq = with_rabbitmq

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="retry-scheduler-tests-"))
        self._folder.chmod(0o711)  # run by root, PostgreSQL's user has to pass through
        self._postgres = PrivatePostgres(self._folder / "postgres")
        self._rabbitmq = PrivateRabbitMQ(self._folder / "rabbitmq")
        self._starter = ThreadPoolExecutor(max_workers=2)
        self._starting = {
            server: self._starter.submit(start)
            for server, start, needed in (
                (self._postgres, self._start_postgres, self._with_postgres),
                (self._rabbitmq, self._rabbitmq.start, self._with_rabbitmq),
            )
            if needed
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._starter.shutdown()
        self._postgres.stop()
        self._rabbitmq.stop()
        shutil.rmtree(self._folder)

    def postgres(self) -> PrivatePostgres:
        """Return the running PostgreSQL; revived, if the test before left it stopped or frozen."""
        return _ready(self._postgres, self._starting[self._postgres])

    def rabbitmq(self) -> PrivateRabbitMQ:
        """Return the running RabbitMQ; revived, if the test before left it stopped or frozen."""
        return _ready(self._rabbitmq, self._starting[self._rabbitmq])

    def _start_postgres(self) -> None:
        self._postgres.start()
        self._postgres.create_role(SERVICE_ROLE, SERVICE_PASSWORD)


def random_name() -> str:
    """Return a name for a database or a virtual host that no other test uses."""
    return f"test_{secrets.token_hex(6)}"


def skip_or_fail(missing: ServerMissing) -> None:
    """Skip the test for a server that is not installed on this desk; where CI is set, fail it."""
    if os.environ.get("CI"):
        pytest.fail(str(missing))
    pytest.skip(str(missing))


def _ready(server: Server, starting: Future[None]) -> Server:
    try:
        starting.result()
    except ServerMissing as missing:
        skip_or_fail(missing)
    server.thaw()
    if not server.is_running:
        server.start()
    return server
