"""The runbook is executable documentation: what it prints runs, chapter by chapter.

That the names in it exist is checked with those of all documents, in tests/test_documented_names.py.
"""

import asyncio
import re
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from retry_scheduler.backoff import BackoffPolicy, delay_before_retry
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.hand import MAX_OUTSTANDING
from retry_scheduler.settings import load_settings
from tests import vocabulary
from tests.contract import HEALED_WITHIN_S, LATE_AT_MOST_S, MOST_DUPLICATES, OPERATIONS, TROUBLES
from tests.documents import CHECKOUT, RUNBOOK, Block, Document
from tests.factories import encoded, make_request
from tests.prometheus import PrivatePrometheus
from tests.promql import metrics
from tests.service_process import ServiceProcess, StartService
from tests.table import Table
from tests.unit_sandbox import directives
from tests.upstream import Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

CHAPTERS = RUNBOOK.chapters()
RULES = CHECKOUT / "deployment" / "prometheus" / "alerts.yml"
UNIT = CHECKOUT / "deployment" / "eracun-retry-scheduler.service"
DEFAULTS = load_settings({})

MESSAGE = "6f1f64d2-95b5-4c0e-9d0b-3ad1c5f8a001"

# First words of commands that are not run here, and why.
NOT_RUN = {
    "systemctl": "the unit is checked without systemd running, see tests/test_deployment_unit.py",
    "journalctl": "the service's log goes to the journal only under systemd",
    "sudo": "changes the machine",
}


def chapter(number: int) -> Document:
    """One of the ten chapters."""
    (found,) = [text for title, text in CHAPTERS.items() if title.startswith(f"{number}. ")]
    return found


def commands(document: Document) -> list[list[str]]:
    """Every command that is printed, word by word; lines that only set something are none."""
    lines = "\n".join(block.text for block in document.blocks("bash")).splitlines()
    return [shlex.split(line) for line in lines if line and not re.match(r"[A-Z_]+=", line)]


def updates() -> list[Block]:
    """The statements for single messages. They are run one by one, each with what it is for."""
    return [statement for statement in chapter(6).statements if statement.text.startswith("UPDATE")]


class Operator:
    """Whoever follows the runbook beside a running service."""

    def __init__(self, service: ServiceProcess, table: Table, rabbitmq: PrivateRabbitMQ) -> None:
        self._service = service
        self._table = table
        self._rabbitmq = rabbitmq

    async def follow(self, document: Document, *, statements: int, commands_run: int) -> None:
        """Run every statement but the updates, and every command; expect so many of each, or more."""
        texts = [statement.text for statement in document.statements if statement not in updates()]
        for text in texts:
            await self._table.fetch(text)
        done = [command for command in commands(document) if command[0] not in NOT_RUN]
        for command in done:
            await self._run(*command)
        assert len(texts) >= statements
        assert len(done) >= commands_run

    async def _run(self, program: str, *arguments: str) -> None:
        match program:
            case "curl":
                self._get(arguments[-1])
            case "rabbitmqctl":
                self._rabbitmq.ctl(*arguments)
            case "retry-scheduler":
                await self._run_program(*arguments)
            case _:
                pytest.fail(f"{program} is printed and neither run nor left out for a reason")

    def _get(self, address: str) -> None:
        pages = {
            ":8086/health": self._service.health,
            ":8086/ready": self._service.ready,
            ":9094/metrics": self._service.metrics,
        }
        parts = urlsplit(address)
        assert pages[f":{parts.port}{parts.path}"]()

    async def _run_program(self, *arguments: str) -> None:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "retry_scheduler", *arguments],
            env=self._service.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"


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


@pytest.fixture
def operator(busy_service: ServiceProcess, table: Table, rabbitmq: PrivateRabbitMQ) -> Operator:
    return Operator(busy_service, table, rabbitmq)


def test_there_is_a_test_for_each_chapter() -> None:
    titles = [title for title in CHAPTERS if title[0].isdigit()]
    tested = {re.match(r"test_chapter_(\d+)_", name) for name in globals()}

    assert [title.partition(".")[0] for title in titles] == [str(number) for number in range(1, 11)]
    assert {int(match[1]) for match in tested if match} == set(range(1, 11))
    assert RUNBOOK.text.count("```") == 2 * sum(len(text.all_blocks) for text in CHAPTERS.values())


def test_chapter_1_service_overview_promises_what_the_contract_promises() -> None:
    promised = dict(chapter(1).table("promise", ""))

    assert f"within {LATE_AT_MOST_S:.0f} s" in promised["next attempt"]
    assert f"at most {MOST_DUPLICATES} for each instance" in promised["duplicates"]
    assert MOST_DUPLICATES == MAX_OUTSTANDING
    assert f"within {HEALED_WITHIN_S:.0f} s" in promised["a server that went away"]
    assert {DEFAULTS.retry_queue, DEFAULTS.manual_review_queue} <= set(chapter(1).spans)


def test_chapter_2_architecture_has_the_parts_of_the_program_and_its_formula() -> None:
    parts = dict(chapter(2).table("file", "its part"))
    (diagram,) = chapter(2).blocks("text")
    (formula,) = re.findall(r"`(min\(.+?\))` plus up to `JITTER_MS`", chapter(2).text)
    base, cap, jitter = DEFAULTS.base_delay_ms, DEFAULTS.max_delay_ms, DEFAULTS.jitter_ms
    policy = BackoffPolicy(*(timedelta(milliseconds=ms) for ms in (base, cap, jitter)))
    in_python = formula.replace("^", "**").lower()

    for file in parts:
        assert (CHECKOUT / file.strip("`")).exists(), file
    for part in ("consumer", "scheduler"):
        assert part in diagram.text
        assert f"`retry_scheduler/{part}.py`" in parts
    for n in range(8):
        least_ms = eval(in_python, {"min": min, "n": n, "base_delay_ms": base, "max_delay_ms": cap})
        assert delay_before_retry(n, policy, 0.0) == timedelta(milliseconds=least_ms)
        assert delay_before_retry(n, policy, 1.0) == timedelta(milliseconds=least_ms + jitter)


async def test_chapter_3_deployment_asks_pages_that_answer_and_names_the_units_paths(
    operator: Operator,
) -> None:
    unit = directives(UNIT)

    await operator.follow(chapter(3), statements=0, commands_run=3)
    assert unit["EnvironmentFile"][0] in chapter(3).spans
    assert any(span.startswith("/opt/") and span in unit["ExecStart"][0] for span in chapter(3).spans)
    assert UNIT.stem in chapter(3).spans


async def test_chapter_4_monitoring_has_expressions_that_read_what_the_service_exports_and_every_alert(
    operator: Operator, busy_service: ServiceProcess, tmp_path: Path
) -> None:
    good = dict(row[:2] for row in chapter(4).table("page", "good", "otherwise"))
    exported = busy_service.metrics().names | {"up"}
    expressions = [block.text for block in chapter(4).blocks("promql")]

    await operator.follow(chapter(4), statements=0, commands_run=0)
    assert good["`GET :8086/health`"] == f'200 `"status": "{busy_service.health().body["status"]}"`'
    assert good["`GET :8086/ready`"] == f'200 `"status": "{busy_service.ready().body["status"]}"`'
    assert len(expressions) == len(RUNBOOK.blocks("promql")) == 7
    with PrivatePrometheus(tmp_path / "prometheus", rules=RULES, targets=[]) as prometheus:
        for expression in expressions:
            prometheus.query(expression)
            assert metrics(expression) <= exported, expression
    assert set(re.findall(r"^#### (\w+)$", chapter(4).text, re.MULTILINE)) == vocabulary.alerts()


async def test_chapter_5_common_issues_has_statements_and_commands_that_run_and_the_right_defaults(
    operator: Operator,
) -> None:
    printed = re.findall(r"`([A-Z_]+)` \((\d+)\)", chapter(5).text)

    await operator.follow(chapter(5), statements=8, commands_run=3)
    assert len(printed) == 3
    for name, value in printed:
        assert getattr(DEFAULTS, name.lower()) == int(value), name


async def test_chapter_6_troubleshooting_has_statements_and_commands_that_run_and_the_logs_sentences(
    operator: Operator, busy_service: ServiceProcess
) -> None:
    levels = {
        sentence.strip("`"): level
        for sentence, level, *_ in chapter(6).table("sentence", "level", "means", "what to do")
    }

    await operator.follow(chapter(6), statements=4, commands_run=4)
    assert levels.items() >= (OPERATIONS | TROUBLES).items()
    for event in busy_service.log_events():
        assert event["level"] in levels[event["message"]]


async def test_chapter_6_troubleshooting_puts_a_message_off_tries_it_at_once_and_gives_it_up_as_printed(
    busy_service: ServiceProcess, upstream: Upstream, table: Table
) -> None:
    at_once, give_up, put_off = (each.text for each in updates())
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


async def test_chapter_7_maintenance_has_statements_and_commands_that_run_beside_the_service(
    operator: Operator,
) -> None:
    await operator.follow(chapter(7), statements=1, commands_run=2)
    assert f"`RETENTION_DAYS` ago ({DEFAULTS.retention_days})" in chapter(7).text


def test_chapter_8_disaster_recovery_says_what_the_unit_does_and_how_to_start_paused() -> None:
    (example,) = set(re.findall(r"\b(START_PAUSED)=(\w+)", chapter(8).text))
    restart_s = directives(UNIT)["RestartSec"][0]

    assert f"starts it again after {restart_s} s" in chapter(8).text
    assert load_settings(dict([example])).start_paused
    assert {DEFAULTS.retry_queue, DEFAULTS.manual_review_queue} <= set(chapter(8).spans)


def test_chapter_9_performance_tuning_has_the_right_defaults_and_an_example_that_is_valid() -> None:
    defaults = {
        row[0].strip("`"): row[1] for row in chapter(9).table("setting", "default", "raise it when", "price")
    }
    (example,) = chapter(9).blocks("bash")

    assert len(defaults) == 5
    for name, value in defaults.items():
        assert str(getattr(DEFAULTS, name.lower())) == value, name
    settings = dict(line.split("=") for line in example.text.splitlines())
    assert len(settings) == 3
    for name, value in settings.items():
        assert getattr(load_settings(settings), name.lower()) == int(value)


def test_chapter_10_security_names_the_audit_fields_that_every_retry_is_logged_with(
    busy_service: ServiceProcess,
) -> None:
    (sentence,) = re.findall(
        r"^Every retry is in the log with (.+?),? and in the table", chapter(10).text, re.M
    )
    fields = set(re.findall(r"`(\w+)`", sentence))
    logged = [event for event in busy_service.log_events() if event["message"] in OPERATIONS]

    assert len(fields) == 4
    assert {event["message"] for event in logged} == OPERATIONS.keys()
    assert all(fields <= event.keys() for event in logged)
    assert load_settings({"POSTGRES_SSL": "true", "RABBITMQ_URL": "amqps://broker"}).postgres_ssl
