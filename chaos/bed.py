"""What a trial runs on: private servers with safe settings, and in them one database and one virtual host.

Both logins have passwords that occur nowhere else, so that they can be searched for afterwards. Neither
server is tuned.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from retry_scheduler.demo.ports import LOOPBACK
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.demo.private_servers import PrivateServers, private_servers

ROLE = "chaos"
DATABASE_SECRET = "canary-of-the-database"
BROKER_SECRET = "canary-of-the-broker"
SECRETS = {"the database's password": DATABASE_SECRET, "the broker's password": BROKER_SECRET}


@dataclass(frozen=True)
class Place:
    """A database and a virtual host, named alike and empty at first."""

    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ
    name: str

    @property
    def url(self) -> str:
        """The address of the virtual host, for the programs around the service."""
        return self.rabbitmq.url(self.name)

    def settings(self, *, postgres_port: int, rabbitmq_port: int) -> dict[str, str]:
        """Return the settings with which the service finds both through these ports."""
        return {
            "POSTGRES_HOST": LOOPBACK,
            "POSTGRES_PORT": str(postgres_port),
            "POSTGRES_USER": ROLE,
            "POSTGRES_PASSWORD": DATABASE_SECRET,
            "POSTGRES_DB": self.name,
            "RABBITMQ_URL": f"amqp://{ROLE}:{BROKER_SECRET}@{LOOPBACK}:{rabbitmq_port}/{self.name}",
        }

    def sql(self, statement: str) -> str:
        """Run a statement as superuser and return psql's output. Raises PrivateServerError."""
        return self.postgres.sql(statement, database=self.name)

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Return the rows of a query. Raises PrivateServerError."""
        said = self.sql(f"SELECT row_to_json(found) FROM ({query}) AS found")
        return [json.loads(line) for line in said.splitlines()]


class Bed(PrivateServers):
    """Two running servers, and a folder that the service's processes may write to."""

    @contextmanager
    def place(self, name: str) -> Iterator[Place]:
        """Create a database and a virtual host, and drop both when the block ends."""
        self.rabbitmq.add_vhost(name)
        self.rabbitmq.ctl("set_permissions", "-p", name, ROLE, ".*", ".*", ".*")
        self.postgres.create_database(name, owner=ROLE)
        try:
            yield Place(self.postgres, self.rabbitmq, name)
        finally:
            self.postgres.drop_database(name)
            self.rabbitmq.delete_vhost(name)


@contextmanager
def bed() -> Iterator[Bed]:
    """Start both servers, and remove every trace of them afterwards."""
    with private_servers("chaos") as servers:
        servers.postgres.create_role(ROLE, DATABASE_SECRET)
        servers.rabbitmq.ctl("add_user", ROLE, BROKER_SECRET)
        yield Bed(servers.postgres, servers.rabbitmq, servers.folder)
