"""The user's runbook as it was written: what it prints runs, and what it names exists."""

import re
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

from retry_scheduler.settings import Settings
from tests.contract import METRICS, OPERATIONS, SETTINGS, TROUBLES
from tests.factories import make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import Upstream
from tests.vocabulary import SENTENCES
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

RUNBOOK = (Path(__file__).parents[1] / "docs" / "runbook-v1.md").read_text()

# Statements that are not run here, and why.
NOT_RUN = {
    r"\i /backup/retry_queue_backup.sql": "reads the operator's own backup with a command of psql, not of SQL"
}

# Not settings of the program, though written like some.
NOT_SETTINGS = {"ERROR", "MemoryMax", "MemoryHigh", "CPUQuota"}


class Statement(NamedTuple):
    """One SQL statement. line: where its block begins in the runbook."""

    line: int
    text: str


def statements() -> list[Statement]:
    found = []
    blocks = list(re.finditer(r"^ *```sql\n(.*?)^ *```$", RUNBOOK, re.DOTALL | re.MULTILINE))
    inline = list(
        re.finditer(r"`((?:SELECT|EXPLAIN|DELETE|INSERT|UPDATE|VACUUM|REINDEX|CREATE) [^`]+;)`", RUNBOOK)
    )
    for match in blocks + inline:
        line = RUNBOOK[: match.start()].count("\n") + 1
        code = re.sub(r"--.*$", "", match[1], flags=re.MULTILINE)
        found += [
            Statement(line, part.strip())
            for part in re.split(r";|\n(?=\\)|(?<=\.sql)\n", code)
            if part.strip()
        ]
    return found


def setting_names() -> set[str]:
    names = set(re.findall(r"`([A-Z][A-Z_]{3,})[`=]", RUNBOOK)) | set(
        re.findall(r"^ *([A-Z][A-Z_]{3,})=", RUNBOOK, re.MULTILINE)
    )
    return names - NOT_SETTINGS


@pytest.fixture
async def migrated(migrated: Table) -> Table:
    """The tables, and a row in each state, some older than the 30 days of the clean-up."""
    table = migrated
    for status in ("pending", "retried", "failed", "discarded"):
        for age in ("1 hour", "31 days"):
            await table.fetch(
                "INSERT INTO retry_queue (message_id, original_queue, retry_count, max_retries,"
                " next_retry_at, created_at, status, payload_bytes)"
                " VALUES ($1, 'orders', 0, 3, now(), now() - $3::text::interval, $2, 0)",
                new_id(),
                status,
                age,
            )
    await table.fetch("INSERT INTO retry_payload SELECT id, '' FROM retry_queue")
    return table


def test_the_sql_of_the_runbook_is_found() -> None:
    """Guards the tests below: a pattern that finds nothing proves nothing."""
    texts = [statement.text for statement in statements()]

    assert len(texts) == 14
    assert NOT_RUN.keys() <= set(texts)
    assert sum(text.startswith("SELECT") for text in texts) == 7


@pytest.mark.parametrize(
    "statement", statements(), ids=lambda statement: f"line {statement.line}: {statement.text[:50]}"
)
async def test_each_statement_runs_as_it_is_printed(migrated: Table, statement: Statement) -> None:
    if statement.text in NOT_RUN:
        with pytest.raises(Exception, match="syntax error"):
            await migrated.fetch(statement.text)
        return

    await migrated.fetch(statement.text)


async def test_the_clean_up_as_printed_moves_old_rows_whole_into_the_archive(migrated: Table) -> None:
    insert, delete, vacuum = (
        statement.text for statement in statements() if statement.line == _line_of("-- Archive retries")
    )
    old = await migrated.fetch(
        "SELECT * FROM retry_queue WHERE created_at < now() - interval '30 days' ORDER BY id"
    )

    for text in (insert, delete, vacuum):
        await migrated.fetch(text)

    assert await migrated.fetch("SELECT * FROM retry_queue_archive ORDER BY id") == old
    assert await migrated.value("SELECT count(*) FROM retry_queue") == 4
    assert await migrated.value("SELECT count(*) FROM retry_payload") == 4


async def test_the_service_runs_on_after_the_clean_up_the_rebuild_and_the_restore_of_the_index(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service()
    upstream.declare("orders")
    upstream.ask(make_request())
    await upstream.receive("orders", 1)
    await table.fetch("UPDATE retry_queue SET created_at = now() - interval '31 days'")

    for statement in statements():
        if statement.text not in NOT_RUN:
            await table.fetch(statement.text)
    await table.fetch("DROP INDEX idx_retry_next_retry")
    for statement in statements():
        if statement.text.startswith("CREATE INDEX"):
            await table.fetch(statement.text)
    upstream.ask(make_request())

    await upstream.receive("orders", 1, within=timedelta(seconds=5))
    await eventually(table.settled)
    assert service.health().status == 200
    await service.stop()
    await start_service()


@pytest.mark.parametrize("text", sorted(set(re.findall(r'"([A-Z][a-zA-Z]+ [^"{}]{5,})"', RUNBOOK))))
def test_each_log_text_of_the_runbook_is_a_constant_of_the_program_and_provoked_by_a_test(text: str) -> None:
    full = [constant for constant in SENTENCES if constant.startswith(text)]
    assert full, "no such event"
    assert set(full) & (OPERATIONS | TROUBLES).keys(), "tests/test_logs.py does not provoke it"


def test_the_log_texts_of_the_runbook_are_found() -> None:
    named = set(re.findall(r'"([A-Z][a-zA-Z]+ [^"{}]{5,})"', RUNBOOK))

    # "Max retries exceeded" alone is what the runbook greps for.
    assert named == {*OPERATIONS, *TROUBLES, "Max retries exceeded"}


def test_each_metric_and_label_of_the_runbook_exists() -> None:
    named = set(re.findall(r"\b(retr(?:y|ies)_[a-z_]+_(?:total|depth)|service_up)\b", RUNBOOK))

    assert named == {
        "retries_scheduled_total",
        "retries_executed_total",
        "retries_exhausted_total",
        "retry_queue_depth",
        "service_up",
    }
    assert named <= METRICS  # and tests/test_metrics.py finds each of these on the page


def test_each_setting_of_the_runbook_exists() -> None:
    names = setting_names()

    assert {
        "RETRY_POLL_INTERVAL_MS",
        "POSTGRES_POOL_MAX",
        "RABBITMQ_PREFETCH",
        "POSTGRES_SSL",
        "RABBITMQ_URL",
    } <= names
    assert {name.lower() for name in names} <= set(Settings.model_fields)


@pytest.mark.parametrize(
    ("name", "default"), re.findall(r"^ *([A-Z_]+)=\d+ +# Default: (\d+)$", RUNBOOK, re.MULTILINE)
)
def test_each_default_that_the_runbook_prints_is_the_default(name: str, default: str) -> None:
    assert str(SETTINGS[name]) == default


def _line_of(text: str) -> int:
    """The line of the block that begins with `text`."""
    return RUNBOOK[: RUNBOOK.index(text)].count("\n")
