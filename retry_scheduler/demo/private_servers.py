"""Runs both private servers in a folder of their own, and leaves nothing of them behind."""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ


@dataclass(frozen=True)
class PrivateServers:
    """Two running servers, and a folder that goes with them."""

    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ
    folder: Path


@contextmanager
def private_servers(purpose: str) -> Iterator[PrivateServers]:
    """Start both, side by side; leaving the block stops them and removes the folder. purpose: for its name.

    Raises ServerMissing if one is not installed, and PrivateServerError if one does not come up.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"retry-{purpose}-"))
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
        yield PrivateServers(postgres, rabbitmq, folder)
