"""One command of the program, run to its end as a script would."""

import os
import subprocess
import sys

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from tests.servers import Database
from tests.service_process import PROJECT

OK, USAGE, UNAVAILABLE, BUG, CONFIG = 0, 64, 69, 70, 78

Environment = dict[str, str]


def call(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the program with these arguments and settings until it ends; on ports of its own, unless told."""
    http_port, metrics_port = free_ports(2)
    ports = {"HTTP_PORT": str(http_port), "METRICS_PORT": str(metrics_port)}
    return subprocess.run(
        [sys.executable, "-m", "retry_scheduler", *arguments],
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"], "HTTP_HOST": LOOPBACK, **ports, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def settings_for(database: Database, broker_url: str) -> Environment:
    """Return settings that are right."""
    return {
        "RABBITMQ_URL": broker_url,
        "POSTGRES_HOST": database.host,
        "POSTGRES_PORT": str(database.port),
        "POSTGRES_DB": database.name,
        "POSTGRES_USER": database.user,
        "POSTGRES_PASSWORD": database.password,
    }
