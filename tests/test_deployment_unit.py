"""The systemd unit: it is sound and tight, says what the documents say, and the program works inside it."""

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.exit_codes import EX_CONFIG
from retry_scheduler.supervision import STANDS_AFTER_S
from tests.contract import STOPS_WITHIN_S
from tests.document_names import capitals
from tests.documents import Document
from tests.factories import make_request
from tests.servers import Database
from tests.service_process import PROJECT, START_TAKES
from tests.table import Table
from tests.unit_sandbox import directives
from tests.upstream import REVIEW_QUEUE, Upstream
from tests.vocabulary import SETTINGS
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

UNIT = PROJECT / "deployment" / "eracun-retry-scheduler.service"
GUIDE = PROJECT / "docs" / "deployment.md"
RUNBOOK = PROJECT / "docs" / "runbook-v1.md"

PROGRAM = "/opt/eracun/services/retry-scheduler/current/bin/retry-scheduler"

# Of 10. systemd's --threshold counts in tenths.
MOST_EXPOSURE = 1.5

# Written like settings, and settings of somebody else.
NOT_SETTINGS = {
    "RABBITMQ_DEFAULT_USER",  # the server's image
    "RABBITMQ_DEFAULT_PASS",
    "RABBITMQ_PASSWORD",  # whoever runs compose.yaml
    "AF_INET",
    "AF_INET6",
    "AF_UNIX",
}


def only(name: str) -> str:
    """The value of a directive that stands in the unit once."""
    (value,) = directives(UNIT)[name]
    return value


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    # It also looks whether the program is there, which is a matter of the machine.
    unit = tmp_path / UNIT.name
    assert only("ExecStart") == f"{PROGRAM} run"
    unit.write_text(UNIT.read_text().replace(PROGRAM, sys.executable))

    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_exposes_little() -> None:
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSURE * 10:.0f}"]

    done = subprocess.run([*command, str(UNIT)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    (exposure,) = re.findall(r"Overall exposure level .*: ([0-9.]+)", done.stdout)
    assert float(exposure) <= MOST_EXPOSURE
    assert f"`systemd-analyze security`: {exposure}" in GUIDE.read_text()


def test_the_unit_restarts_for_ever_but_not_over_bad_configuration() -> None:
    text = UNIT.read_text()
    unit_section = text[text.index("[Unit]") : text.index("[Service]")]

    assert "\nStartLimitIntervalSec=0\n" in unit_section  # anywhere else systemd would pass over it
    assert only("Restart") == "always"
    assert only("RestartPreventExitStatus") == str(EX_CONFIG)
    assert int(only("TimeoutStopSec")) > STOPS_WITHIN_S
    assert only("Type") == "notify"
    assert f"blocked for {only('WatchdogSec')} s" in GUIDE.read_text()
    assert f"not moved for {STANDS_AFTER_S:.0f} s" in GUIDE.read_text()


def test_a_reload_sends_the_signal_at_which_the_service_reads_its_secrets_again() -> None:
    assert only("ExecReload") == "/bin/kill -HUP $MAINPID"
    assert "`SIGHUP`" in (PROJECT / "docs" / "contract.md").read_text()


def test_the_unit_has_what_the_runbook_says_about_it() -> None:
    runbook = RUNBOOK.read_text()
    hardening = runbook[runbook.index("### systemd Hardening") : runbook.index("### Network Security")]
    limits = runbook[runbook.index("### Resource Limits") : runbook.index("**PostgreSQL:**")]
    said = re.findall(r"^- `(.+?)`", hardening, re.MULTILINE) + re.findall(
        r"^(\w+=\w+%?)", limits, re.MULTILINE
    )

    assert len(said) == 8
    assert set(said) <= set(UNIT.read_text().splitlines())
    assert only("EnvironmentFile") in runbook
    assert str(UNIT.relative_to(PROJECT)) in runbook


def test_every_setting_and_path_in_the_deployment_files_exists() -> None:
    guide = GUIDE.read_text()

    for file in (UNIT, PROJECT / "compose.yaml", PROJECT / "Dockerfile"):
        assert set(capitals(Document(file))) - NOT_SETTINGS <= SETTINGS, file.name
    for path in (
        PROGRAM,
        only("EnvironmentFile"),
        *(value.split(":")[1] for value in credentials().values()),
    ):
        assert path in guide
    for path in re.findall(r"COPY (?!--from)(.+) \S+$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE):
        assert all((PROJECT / name).exists() for name in path.split()), path


def credentials() -> dict[str, str]:
    """The unit's LoadCredential lines, by the name of the credential."""
    return {value.split(":")[0]: value for value in directives(UNIT)["LoadCredential"]}


def page(port: int, name: str) -> str:
    """GET a page. Raises urllib's HTTPError unless the answer is 200."""
    with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/{name}", timeout=5) as answer:
        return str(answer.read().decode())


@contextmanager
def unit_process(environment: dict[str, str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run the service under the unit's filters until the block is left."""
    confined = [sys.executable, "-m", "tests.unit_sandbox", str(UNIT)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*confined, sys.executable, "-m", "retry_scheduler", "run"],
            cwd=PROJECT,
            env={"PATH": os.environ["PATH"], **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(timeout=10)


def unit_environment(folder: Path, secrets: dict[str, str]) -> dict[str, str]:
    """What the unit puts into the environment, with the credentials as files in `folder`."""
    for name, fallback in (value.split(":") for value in directives(UNIT)["SetCredential"]):
        assert name in credentials()
        (folder / name).write_text(secrets.get(name, fallback.encode().decode("unicode_escape")))
    lines = [value.replace("%d", str(folder)) for value in directives(UNIT)["Environment"]]
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize(
    "secrets_in_files", [True, False], ids=["secrets as credentials", "secrets as settings"]
)
async def test_the_program_does_its_work_confined_as_the_unit_says(
    secrets_in_files: bool,
    database: Database,
    broker_url: str,
    upstream: Upstream,
    table: Table,
    tmp_path: Path,
) -> None:
    http_port, metrics_port = free_ports(2)
    settings = {
        "HTTP_HOST": LOOPBACK,
        "HTTP_PORT": str(http_port),
        "METRICS_PORT": str(metrics_port),
        "POSTGRES_HOST": "localhost",  # a name, so that looking up names is tried as well
        "POSTGRES_PORT": str(database.port),
        "POSTGRES_DB": database.name,
        "POSTGRES_USER": database.user,
        "BASE_DELAY_MS": "20",
        "JITTER_MS": "10",
    }
    secrets = {"postgres_password": database.password, "rabbitmq_url": broker_url}
    environment = settings | unit_environment(tmp_path, secrets if secrets_in_files else {})
    if not secrets_in_files:
        environment |= {name.upper(): value for name, value in secrets.items()}
    log = tmp_path / "log"
    upstream.declare("orders")

    with unit_process(environment, log) as process:
        await eventually(lambda: page(http_port, "ready"), within=START_TAKES)
        upstream.ask(make_request(), make_request(max_retries=0), b"no request")
        await upstream.filled("orders", 1)
        await upstream.filled(REVIEW_QUEUE, 2)
        await eventually(table.settled)
        assert "process_resident_memory_bytes" in page(metrics_port, "metrics")
        process.terminate()
        await eventually(lambda: process.poll() is not None, within=timedelta(seconds=STOPS_WITHIN_S))

        assert process.returncode == 0
        assert "not permitted" not in log.read_text()
