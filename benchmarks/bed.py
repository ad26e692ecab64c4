"""What a benchmark runs on: private servers with safe settings, and the real service as a process."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from retry_scheduler.demo.ports import free_ports
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ

START_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Bed:
    """Two running servers and a folder for logs."""

    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """The settings with which the service finds the servers."""
        return {
            "POSTGRES_HOST": self.postgres.host,
            "POSTGRES_PORT": str(self.postgres.port),
            "POSTGRES_USER": self.postgres.superuser,
            "POSTGRES_DB": "eracun",
            "RABBITMQ_URL": self.rabbitmq.url(),
        }

    @contextmanager
    def service(self, settings: Mapping[str, str]) -> Iterator["ServiceProcess"]:
        """Run one instance with `settings` on top of the defaults; its log goes to a file."""
        http_port, metrics_port = free_ports(2)
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if name in ("PATH", "HOME", "LANG", "PYTHONPATH")
            },
            **self.environment,
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": str(http_port),
            "METRICS_PORT": str(metrics_port),
            **settings,
        }
        log = self.folder / f"service-{http_port}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "retry_scheduler", "run"],
                env=environment,
                stdout=output,
                stderr=output,
            )
        service = ServiceProcess(process, http_port, metrics_port, log)
        try:
            service.wait_until_ready()
            yield service
        finally:
            process.terminate()
            process.wait(timeout=25)


@dataclass(frozen=True)
class ServiceProcess:
    """One running instance."""

    process: "subprocess.Popen[bytes]"
    http_port: int
    metrics_port: int
    log: Path

    def wait_until_ready(self) -> None:
        """Return once GET /ready says 200. Raises RuntimeError with the log's end if it does not come."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/ready", timeout=2):
                    return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"the service did not become ready:\n{self.log.read_text()[-2000:]}")

    def cpu_seconds(self) -> float:
        """Return the processor time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> float:
        """Return the resident memory now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def bed() -> Iterator[Bed]:
    """Start both servers, and remove every trace of them afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="retry-bench-"))
    folder.chmod(0o711)  # PostgreSQL's unprivileged user must reach its own folder inside
    with ExitStack() as cleaning:
        cleaning.callback(shutil.rmtree, folder, ignore_errors=True)
        postgres = PrivatePostgres(folder / "postgres")
        rabbitmq = PrivateRabbitMQ(folder / "rabbitmq")
        cleaning.callback(postgres.stop)
        cleaning.callback(rabbitmq.stop)
        with ThreadPoolExecutor() as pool:
            for starting in [pool.submit(postgres.start), pool.submit(rabbitmq.start)]:
                starting.result()
        postgres.create_database("eracun")
        yield Bed(postgres, rabbitmq, folder)
