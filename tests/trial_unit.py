"""The unit as it is delivered, under a real systemd: `make unit-trial`. Needs root; see booted_systemd.

Not part of `make test`, which needs no root and no cgroup2.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from tests import test_reload
from tests.booted_systemd import BootedSystemd
from tests.contract import STOPS_WITHIN_S
from tests.factories import make_request
from tests.service_process import PROJECT
from tests.table import Table
from tests.test_deployment_unit import PROGRAM, UNIT, page
from tests.test_reload import Logins
from tests.upstream import REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

logins = test_reload.logins
stored = test_reload.stored

NAME = UNIT.stem
SETTINGS = "/etc/eracun/retry-scheduler.env"
COPIED = "/etc/eracun/credentials/retry-scheduler"
DIRECT = "/etc/eracun/secrets"
FOR_OPERATORS = "/usr/local/bin/retry-scheduler"
DROP_IN = f"/etc/systemd/system/{UNIT.name}.d/trial.conf"
STARTS_WITHIN = timedelta(seconds=20)
# WatchdogSec, and as much again for systemd to end the process and start the next one.
WATCHDOG_ACTS_WITHIN = timedelta(seconds=60)

# The libraries are this environment's. What is below /root or /tmp, the unit would not see.
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
LAUNCHER = f"""#!/bin/sh
export PYTHONPATH=/opt/trial/checkout:/opt/trial/venv/lib/{PYTHON}/site-packages
export LD_LIBRARY_PATH=/opt/trial/python/lib
exec /opt/trial/python/bin/{PYTHON} -m retry_scheduler "$@"
"""


class Machine:
    """A machine on which the service is installed as docs/deployment.md says, and has not been started."""

    def __init__(self, systemd: BootedSystemd, http_port: int, metrics_port: int) -> None:
        self.systemd = systemd
        self.http_port = http_port
        self.metrics_port = metrics_port

    def systemctl(self, *arguments: str) -> str:
        return self.systemd.systemctl(*arguments, NAME).stdout

    def shown(self, name: str) -> str:
        return self.systemd.shown(NAME, name)

    def signal_to_main(self, name: str) -> None:
        self.systemctl("kill", f"--signal={name}", "--kill-whom=main")

    def facts(self) -> dict[str, str]:
        """What the kernel says about the service's process."""
        status = self.systemd.run("cat", f"/proc/{self.shown('MainPID')}/status").stdout
        return dict(line.split(":\t", 1) for line in status.splitlines())

    def told(self, sentence: str) -> list[str]:
        """The journal's lines with a sentence."""
        return [line for line in self.systemd.journal(NAME) if sentence in line]

    def write(self, path: str, text: str, *, mode: str = "600") -> None:
        self.systemd.run(
            "sh", "-ec", 'printf %s "$2" | install -D -m "$3" /dev/stdin "$1"', "sh", path, text, mode
        )

    def write_secrets(self, folder: str, logins: Logins, *, mode: str = "600") -> None:
        for name, file in (("postgres_password", logins.password_file), ("rabbitmq_url", logins.url_file)):
            self.write(f"{folder}/{name}", file.read_text(), mode=mode)


@pytest.fixture
def machine(logins: Logins) -> Iterator[Machine]:
    http_port, metrics_port = free_ports(2)
    settings = {
        "BASE_DELAY_MS": "20",
        "JITTER_MS": "10",
        "POSTGRES_HOST": LOOPBACK,
        "POSTGRES_PORT": str(logins.postgres.port),
        "POSTGRES_DB": logins.database,
        "POSTGRES_USER": logins.name,
        "HTTP_HOST": LOOPBACK,
        "HTTP_PORT": str(http_port),
        "METRICS_PORT": str(metrics_port),
    }
    bound = {
        "/opt/trial/python": Path(sys.base_prefix),
        "/opt/trial/venv": Path(sys.prefix),
        "/opt/trial/checkout": PROJECT,
    }
    with BootedSystemd(Path(tempfile.mkdtemp(prefix="retry-scheduler-trial-")), bound) as systemd:
        made = Machine(systemd, http_port, metrics_port)
        made.write(PROGRAM, LAUNCHER, mode="755")
        made.write(SETTINGS, "".join(f"{name}={value}\n" for name, value in settings.items()))
        made.write_secrets(COPIED, logins)
        made.write(f"/etc/systemd/system/{UNIT.name}", UNIT.read_text(), mode="644")
        made.write(FOR_OPERATORS, (UNIT.parent / "retry-scheduler").read_text(), mode="755")
        systemd.systemctl("daemon-reload")
        yield made


@pytest.mark.timeout(300)
async def test_the_unit_as_delivered_starts_works_confined_restarts_reloads_and_stops(
    machine: Machine, upstream: Upstream, stored: Table, logins: Logins
) -> None:
    upstream.declare("orders")

    async def works() -> None:
        await eventually(lambda: page(machine.http_port, "ready"), within=STARTS_WITHIN)
        upstream.ask(make_request(), make_request(max_retries=0), b"no request")
        await upstream.receive("orders", 1)
        await upstream.receive(REVIEW_QUEUE, 2)
        await eventually(stored.settled)

    # It starts, and says so itself. Both secrets come as credentials.
    machine.systemctl("enable", "--now")
    assert [machine.shown("ActiveState"), machine.shown("SubState")] == ["active", "running"]
    await works()
    await eventually(lambda: machine.shown("StatusText") == "healthy")

    # It is confined, and nothing that it needs is refused.
    facts = machine.facts()
    assert [facts["NoNewPrivs"], facts["Seccomp"], int(facts["CapBnd"], 16)] == ["1", "2", 0]
    assert facts["Uid"].split()[0] != "0"
    assert "process_resident_memory_bytes" in page(machine.metrics_port, "metrics")
    assert machine.told("not permitted") == []

    assert "WRONG" not in machine.systemd.run(FOR_OPERATORS, "check").stdout

    # Killed, it is there again. Frozen, it is found by the watchdog.
    machine.signal_to_main("KILL")
    await eventually(lambda: machine.shown("NRestarts") == "1", within=STARTS_WITHIN)
    await works()
    machine.signal_to_main("STOP")
    froze_s = time.monotonic()
    await eventually(lambda: machine.shown("NRestarts") == "2", within=WATCHDOG_ACTS_WITHIN)
    print(f"restarted {time.monotonic() - froze_s:.0f} s after it froze")  # noqa: T201
    await works()
    assert machine.told("Watchdog timeout")
    assert machine.told("Fatal Python error: Aborted")

    # A reload keeps the copies of the secrets that systemd made; a restart does not.
    process = machine.shown("MainPID")
    logins.set_on_servers("second")
    logins.write_files("second")
    machine.write_secrets(COPIED, logins)
    machine.systemctl("reload")
    await eventually(lambda: machine.told("Secrets reloaded"))
    assert '"changed":[]' in machine.told("Secrets reloaded")[-1].replace(" ", "")
    assert machine.shown("MainPID") == process
    machine.systemctl("restart")
    await works()

    # Of files that it reads itself, a reload is enough.
    machine.systemd.run("groupadd", "eracun-secrets")
    machine.systemd.run("install", "-d", "-m", "750", "-g", "eracun-secrets", DIRECT)
    machine.write_secrets(DIRECT, logins, mode="640")
    machine.systemd.run("sh", "-ec", f"chgrp eracun-secrets {DIRECT}/*")
    machine.write(DROP_IN, drop_in_of_the_guide(), mode="644")
    machine.systemd.systemctl("daemon-reload")
    machine.systemctl("restart")
    await works()
    logins.set_on_servers("third")
    logins.write_files("third")
    for name, file in (("postgres_password", logins.password_file), ("rabbitmq_url", logins.url_file)):
        overwrite = f'printf %s "$1" >{DIRECT}/{name}'
        machine.systemd.run("sh", "-ec", overwrite, "sh", file.read_text())
    machine.systemctl("reload")
    await eventually(lambda: "RABBITMQ_URL" in machine.told("Secrets reloaded")[-1])
    logins.cut()
    await works()

    # Started paused, it is released as the runbook says.
    machine.systemd.run("sh", "-ec", f"echo START_PAUSED=true >>{SETTINGS}")
    machine.systemctl("restart")
    await eventually(lambda: machine.told("Service paused"), within=STARTS_WITHIN)
    machine.signal_to_main("SIGUSR1")
    await works()

    # Stopped, it leaves with 0 within its time.
    began_s = time.monotonic()
    machine.systemctl("stop")
    assert time.monotonic() - began_s < STOPS_WITHIN_S
    shown = [machine.shown(name) for name in ("ActiveState", "Result", "ExecMainStatus")]
    assert shown == ["inactive", "success", "0"]

    # Over bad configuration it is not started again.
    machine.systemd.run("sh", "-ec", f"echo HTTP_PORT=none >>{SETTINGS}")
    machine.systemd.systemctl("start", NAME, check=False)
    await eventually(lambda: machine.shown("ActiveState") == "failed")
    assert [machine.shown("ExecMainStatus"), machine.shown("NRestarts")] == ["78", "0"]
    assert machine.told("HTTP_PORT")


def drop_in_of_the_guide() -> str:
    """The lines that docs/deployment.md gives for secrets without copies."""
    guide = (PROJECT / "docs" / "deployment.md").read_text()
    (text,) = [block for block in guide.split("```ini\n")[1:] if "SupplementaryGroups" in block]
    return text.partition("```")[0]
