"""Sets the stage: a private PostgreSQL, a private RabbitMQ and the real service, in one folder.

Whatever happens, leaving ends all three. The service runs with its default
settings, except for where its servers are and on which ports it listens.
"""

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.error import URLError
from urllib.request import urlopen

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.demo.processes import PrivateServerError, ServerProcess
from retry_scheduler.settings import Settings, load_settings

# Normally under a second; a multiple of that on a machine that is busy with other things.
SERVICE_STARTS_WITHIN = timedelta(seconds=60)
# It promises to stop in under 20 s; without faults it takes tenths of a second.
SERVICE_STOPS_WITHIN = timedelta(seconds=20)

LOG_TAIL_LINES = 15


class Stage:
    """The three programs. An async context manager: entering starts them, leaving ends them."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """folder: empty, and removed by whoever made it. say: told in a sentence what happens meanwhile."""
        self.postgres = PrivatePostgres(folder / "postgres")
        self.rabbitmq = PrivateRabbitMQ(folder / "rabbitmq")
        self._folder = folder
        self._say = say
        self._starting: list[Future[None]] = []
        self._starter = ThreadPoolExecutor(max_workers=2, thread_name_prefix="start")
        self._service: ServerProcess | None = None
        self._environment: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        """Start everything.

        Raises ServerMissing if a server is not installed, and PrivateServerError if a program does not
        come up; either may come in an ExceptionGroup.
        """
        self._say(f"Starting private servers in {self._folder}")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._in_thread("PostgreSQL is up", self._start_postgres))
                tasks.create_task(self._in_thread("RabbitMQ is up", self.rabbitmq.start))
            await self._in_thread("retry-scheduler is ready", self._start_service)
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        self._end()

    @property
    def settings(self) -> Settings:
        """The settings that the service runs with."""
        return load_settings(self._environment)

    @property
    def log(self) -> Path:
        """The service's log, which goes with the folder."""
        return self._folder / "service.log"

    async def guard(self) -> None:
        """Raise PrivateServerError once one of the programs has ended by itself; never return."""
        while True:
            for name, program in (
                ("PostgreSQL", self.postgres.is_running),
                ("RabbitMQ", self.rabbitmq.is_running),
                ("retry-scheduler", self._service is not None and self._service.is_alive),
            ):
                if not program:
                    raise PrivateServerError(f"{name} has ended by itself")
            await asyncio.sleep(0.2)

    def keep_log(self) -> str:
        """Save the service's log before the folder goes, and return where it is and its last lines."""
        if not self.log.exists():
            return "The service was not started."
        handle, name = tempfile.mkstemp(prefix="retry-scheduler-demo-", suffix=".log")
        os.close(handle)
        kept = Path(shutil.copyfile(self.log, name))
        lines = kept.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"The service's log is in {kept}. Its last lines:", *lines[-LOG_TAIL_LINES:]])

    async def _in_thread(self, done: str, start: Callable[[], None]) -> None:
        began = time.monotonic()
        starting = self._starter.submit(start)
        self._starting.append(starting)
        await asyncio.wrap_future(starting)
        self._say(f"  {done} after {time.monotonic() - began:.1f} s")

    def _start_postgres(self) -> None:
        defaults = load_settings({})
        self.postgres.start()
        self.postgres.create_role(defaults.postgres_user, password="")  # none is asked for
        self.postgres.create_database(defaults.postgres_db, owner=defaults.postgres_user)

    def _start_service(self) -> None:
        http_port, metrics_port = free_ports(2)
        self._environment = {
            "POSTGRES_HOST": self.postgres.host,
            "POSTGRES_PORT": str(self.postgres.port),
            "RABBITMQ_URL": self.rabbitmq.url(),
            "HTTP_HOST": LOOPBACK,
            "HTTP_PORT": str(http_port),
            "METRICS_PORT": str(metrics_port),
        }
        ours = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
        self._service = ServerProcess(
            command=[sys.executable, "-m", "retry_scheduler", "run"],
            folder=Path.cwd(),  # where we have found the package ourselves, if it is not installed
            output=self.log,
            environment={**ours, "HOME": str(self._folder), **self._environment},
        )
        self._service.start()
        self._service.wait_until_serving(lambda: _answers(http_port), within=SERVICE_STARTS_WITHIN)

    def _end(self) -> None:
        if not all(starting.done() for starting in self._starting):
            # It cannot be called back, and would be left behind if it were not waited for.
            self._say("Ending, once that which is being started is up ...")
        self._starter.shutdown(cancel_futures=True)
        if self._service is not None:
            self._service.stop(within=SERVICE_STOPS_WITHIN)
        self.postgres.stop()
        self.rabbitmq.kill()  # stopping in order takes longer, and its data are going to be removed


def _answers(http_port: int) -> bool:
    try:
        with urlopen(f"http://{LOOPBACK}:{http_port}/ready", timeout=2):
            return True
    except URLError:  # not listening yet, or not ready: HTTPError is one of them
        return False
