"""What a benchmark runs on: private servers with safe settings, and programs that work on them.

fsync, full_page_writes and synchronous_commit are on; nothing else of either server is tuned.
"""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from benchmarks.usage import Usage
from retry_scheduler.demo.ports import free_ports
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.demo.private_servers import PrivateServers, private_servers

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 25.0

CHECKOUT = Path(__file__).resolve().parent.parent

_PASSED_ON = ("PATH", "HOME", "LANG", "PYTHONPATH")


@dataclass(frozen=True)
class Program:
    """A running program under measurement. Its output is in `log`."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return once `ready` is true. Raises RuntimeError with the log's end if that does not come."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if ready():
                return
            time.sleep(0.05)
        said = self.log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self.process.args!r} did not become ready:\n{said}")

    def stop(self) -> None:
        """Ask it to end, and kill it if it does not."""
        self.process.terminate()
        try:
            self.process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Place:
    """A database and a virtual host of one run, named alike and empty at first."""

    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ
    folder: Path
    name: str

    @property
    def url(self) -> str:
        """The address of the virtual host."""
        return self.rabbitmq.url(self.name)

    @property
    def environment(self) -> dict[str, str]:
        """The settings with which the service finds database and virtual host."""
        return {
            "POSTGRES_HOST": self.postgres.host,
            "POSTGRES_PORT": str(self.postgres.port),
            "POSTGRES_USER": self.postgres.superuser,
            "POSTGRES_DB": self.name,
            "RABBITMQ_URL": self.url,
        }

    async def connect(self) -> asyncpg.Connection:
        """Return a connection to the database, for set-up and for looking afterwards."""
        return await asyncpg.connect(
            host=self.postgres.host,
            port=self.postgres.port,
            user=self.postgres.superuser,
            database=self.name,
        )

    def connections(self) -> int:
        """Return how many connections to the database are open now."""
        count = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{self.name}'"
        return int(self.postgres.sql(count))

    def usage(self, programs: Sequence[Program]) -> Usage:
        """Return what `programs` and the servers have used so far."""
        return Usage.now(
            programs=[program.pid for program in programs],
            rabbitmq=self.rabbitmq.pid,
            postgres=self.postgres.pid,
        )

    def migrate(self) -> None:
        """Create the service's tables."""
        subprocess.run(
            [sys.executable, "-m", "retry_scheduler", "migrate"],
            env=self._environment({}),
            cwd=CHECKOUT,
            check=True,
            capture_output=True,
        )

    @contextmanager
    def service(self, settings: Mapping[str, str]) -> Iterator[Program]:
        """Run one instance of the service with `settings` on top of the defaults."""
        http_port, metrics_port = free_ports(2)
        address = f"http://127.0.0.1:{http_port}/ready"
        ports = {"HTTP_HOST": "127.0.0.1", "HTTP_PORT": str(http_port), "METRICS_PORT": str(metrics_port)}
        command = [sys.executable, "-m", "retry_scheduler", "run"]
        with self.program(command, {**ports, **settings}, lambda _: _answers(address)) as program:
            yield program

    @contextmanager
    def program(
        self, command: Sequence[str | Path], settings: Mapping[str, str], ready: Callable[[Path], bool]
    ) -> Iterator[Program]:
        """Run a program from this checkout until the block ends. ready: asked with the path of its log."""
        log = self.folder / f"{self.name}-{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=self._environment(settings), cwd=CHECKOUT, stdout=output, stderr=output
            )
        program = Program(process, log)
        try:
            program.wait_until(lambda: ready(log))
            yield program
        finally:
            program.stop()
            log.unlink()  # a hundred thousand lines a run

    def _environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in _PASSED_ON}
        return {**kept, **self.environment, **settings}


class Bed(PrivateServers):
    """Two running servers and a folder for logs."""

    @contextmanager
    def place(self, name: str) -> Iterator[Place]:
        """Create a database and a virtual host, and drop both when the block ends."""
        self.rabbitmq.add_vhost(name)
        self.postgres.create_database(name)
        try:
            yield Place(self.postgres, self.rabbitmq, self.folder, name)
        finally:
            self.postgres.drop_database(name)
            self.rabbitmq.delete_vhost(name)

    def settle(self) -> None:
        """Write out what earlier runs have left in memory, so that the next one does not pay for it."""
        self.postgres.sql("CHECKPOINT")


@contextmanager
def bed() -> Iterator[Bed]:
    """Start both servers, and remove every trace of them afterwards."""
    with private_servers("bench") as servers:
        yield Bed(servers.postgres, servers.rabbitmq, servers.folder)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except OSError:
        return False
