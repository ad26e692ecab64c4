"""The runbook is executable documentation: what it prints runs, and what it names exists."""

import asyncio
import re
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.settings import SECRETS, Settings, load_settings
from tests.contract import OPERATIONS, TROUBLES
from tests.factories import encoded, make_request
from tests.prometheus import PrivatePrometheus
from tests.promql import metrics
from tests.service_process import ServiceProcess, StartService
from tests.table import Table
from tests.upstream import Upstream
from tests.vocabulary import SENTENCES
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

CHECKOUT = Path(__file__).parents[1]
DOCS = CHECKOUT / "docs"
RUNBOOK = (DOCS / "runbook.md").read_text()
EVERYTHING = "\n".join(path.read_text() for path in [CHECKOUT / "README.md", *sorted(DOCS.glob("*.md"))])

MESSAGE = "6f1f64d2-95b5-4c0e-9d0b-3ad1c5f8a001"

# First words of commands that are not run here, and why.
NOT_RUN = {
    "systemctl": "the unit is checked without systemd running, see tests/test_deployment_unit.py",
    "journalctl": "the service's log goes to the journal only under systemd",
    "sudo": "changes the machine",
    "iostat": "not part of this project",
}

# Written like settings, and none of the program's.
NOT_SETTINGS = {"ACCESS_REFUSED", "UPDATE", "SELECT", "CONCURRENTLY", "REINDEX"}


class Block(NamedTuple):
    """One block of code. line: where it begins."""

    line: int
    text: str


def blocks(language: str) -> list[Block]:
    found = re.finditer(rf"^```{language}\n(.*?)^```$", RUNBOOK, re.DOTALL | re.MULTILINE)
    return [Block(RUNBOOK[: match.start()].count("\n") + 1, match[1]) for match in found]


def statements() -> list[Block]:
    return [
        Block(block.line, part.strip())
        for block in blocks("sql")
        for part in re.sub(r"--.*$", "", block.text, flags=re.MULTILINE).split(";")
        if part.strip()
    ]


def commands() -> list[Block]:
    return [
        Block(block.line + place + 1, line)
        for block in blocks("bash")
        for place, line in enumerate(block.text.splitlines())
        if line and not re.match(r"[A-Z_]+=", line)
    ]


def examples() -> dict[str, str]:
    """The settings that are printed as examples."""
    return dict(
        re.findall(r"^([A-Z_]+)=(\S+)", "\n".join(block.text for block in blocks("bash")), re.MULTILINE)
    )


def test_the_blocks_of_the_runbook_are_found() -> None:
    """Guards the tests below: a pattern that finds nothing proves nothing."""
    assert len(statements()) >= 15
    assert len(commands()) >= 15
    assert len(blocks("promql")) >= 7
    assert len(examples()) >= 3


@pytest.fixture
async def busy_service(start_service: StartService, upstream: Upstream, table: Table) -> ServiceProcess:
    """A service that has delivered, given up, quarantined, and has one message waiting."""
    service = await start_service(BASE_DELAY_MS="1", JITTER_MS="0")
    upstream.declare("orders")
    upstream.ask(make_request())
    upstream.ask(make_request(retry_count=3, max_retries=3))
    upstream.ask(make_request(original_payload="not base64"))
    upstream.ask(make_request(message_id=MESSAGE, retry_after_ms=3_600_000))
    await upstream.receive("orders", 1)
    await upstream.receive("manual-review.pending", 2)

    async def all_is_settled() -> bool:
        return await table.statuses() == {"retried": 1, "failed": 1, "pending": 1}

    await eventually(all_is_settled)
    return service


async def test_each_statement_runs_beside_the_running_service(
    busy_service: ServiceProcess, table: Table
) -> None:
    for statement in statements():
        if not statement.text.startswith("UPDATE"):
            await table.fetch(statement.text)


async def test_a_message_is_put_off_tried_at_once_or_given_up_as_printed(
    busy_service: ServiceProcess, upstream: Upstream, table: Table
) -> None:
    at_once, give_up, put_off = (each.text for each in statements() if each.text.startswith("UPDATE"))
    waits = (
        "SELECT next_retry_at > now() + interval '59 minutes' FROM retry_queue"
        f" WHERE message_id = '{MESSAGE}'"
    )

    await table.fetch(put_off)
    assert await table.value(waits)
    await table.fetch(at_once)
    await upstream.receive("orders", 1, within=timedelta(seconds=5))

    upstream.ask(make_request(message_id=MESSAGE, retry_count=1, retry_after_ms=1_000))
    await eventually(lambda: table.value("SELECT count(*) = 1 FROM retry_queue WHERE status = 'pending'"))
    await table.fetch(give_up)
    upstream.ask(make_request(original_payload=encoded(b"the next one"), retry_after_ms=2_000))
    (message,) = await upstream.receive("orders", 1, within=timedelta(seconds=7))
    assert message.body == b"the next one"


async def test_each_page_that_is_asked_for_answers(busy_service: ServiceProcess) -> None:
    pages = {
        "8086/health": busy_service.health,
        "8086/ready": busy_service.ready,
        "9094/metrics": busy_service.metrics,
    }
    asked = [shlex.split(command.text)[-1] for command in commands() if command.text.startswith("curl")]

    assert asked
    for address in asked:
        parts = urlsplit(address)
        assert pages[f"{parts.port}{parts.path}"]()


async def test_each_command_of_the_broker_runs(rabbitmq: PrivateRabbitMQ) -> None:
    asked = [
        shlex.split(command.text)[1:] for command in commands() if command.text.startswith("rabbitmqctl")
    ]

    assert asked
    for arguments in asked:
        rabbitmq.ctl(*arguments)


async def test_each_command_of_the_program_runs_beside_the_service(busy_service: ServiceProcess) -> None:
    asked = [
        shlex.split(command.text) for command in commands() if command.text.startswith("retry-scheduler")
    ]

    assert asked
    for _, *arguments in asked:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "retry_scheduler", *arguments],
            env=busy_service.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"


def test_each_other_command_is_left_out_for_a_reason() -> None:
    run = {"curl", "rabbitmqctl", "retry-scheduler"}

    assert {shlex.split(command.text)[0] for command in commands()} <= run | NOT_RUN.keys()


async def test_each_expression_is_understood_by_prometheus_and_reads_what_the_service_exports(
    busy_service: ServiceProcess, tmp_path: Path
) -> None:
    exported = busy_service.metrics().names | {"up"}
    rules = CHECKOUT / "deployment" / "prometheus" / "alerts.yml"
    with PrivatePrometheus(tmp_path / "prometheus", rules=rules, targets=[]) as prometheus:
        for block in blocks("promql"):
            prometheus.query(block.text)
            assert metrics(block.text) <= exported, block.text


def test_the_example_configuration_is_valid() -> None:
    load_settings(examples())


def test_each_setting_that_is_named_exists() -> None:
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)[`=]", RUNBOOK)) - NOT_SETTINGS
    known = {name.upper() for name in Settings.model_fields} | {f"{name}_FILE" for name in SECRETS}

    assert named
    assert named <= known


def test_each_file_that_is_named_exists() -> None:
    inside = set(re.findall(r"`((?:retry_scheduler|deployment|docs|tests)/[\w./-]*)`", RUNBOOK))
    linked = set(re.findall(r"\]\(([\w.-]+\.md)(?:#[\w.-]*)?\)", RUNBOOK))

    assert inside
    assert linked
    assert [path for path in inside if not (CHECKOUT / path).exists()] == []
    assert [path for path in linked if not (DOCS / path).exists()] == []


def test_each_link_into_the_page_leads_somewhere_and_each_alert_has_its_place() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", RUNBOOK, re.MULTILINE)
    }

    rules = (CHECKOUT / "deployment" / "prometheus" / "alerts.yml").read_text()
    alerts = set(re.findall(r"runbook_url: docs/runbook\.md#(\w+)", rules))

    assert set(re.findall(r"\(#([\w.-]+)\)", RUNBOOK)) <= anchors
    assert alerts
    assert alerts <= anchors


def test_each_sentence_of_the_log_that_is_named_exists() -> None:
    table = RUNBOOK[RUNBOOK.index("| sentence | means |") :].split("\n\n")[0]
    named = set(re.findall(r"`([A-Z][a-z][^`]+)`", table))

    assert len(named) >= 10
    assert [text for text in named if not any(constant.startswith(text) for constant in SENTENCES)] == []
    assert {*OPERATIONS, *TROUBLES} <= named


def test_every_setting_metric_table_and_page_is_named_in_some_document(busy_service: ServiceProcess) -> None:
    settings = {name.upper() for name in Settings.model_fields}
    exported = {
        re.sub(r"_(bucket|sum|count|created)$", "", name)
        for name in busy_service.metrics().names
        if not name.startswith("process_")
    }
    tables = {"retry_queue", "retry_queue_archive", "retry_payload", "retry_quarantine", "retry_instance"}

    missing = [name for name in settings | exported | tables if not re.search(rf"\b{name}\b", EVERYTHING)]

    assert missing == []
