"""What a document names exists, and what exists is named by a document.

Names are settings, metrics, sentences of the log, tables, columns, pages, files, commands, options, make
targets and alerts: what tests/vocabulary.py takes from the program, and what tests/document_names.py finds
in every document, and in the comments of the files that people edit.
"""

import re
from collections.abc import Callable, Iterable

import asyncpg
import pytest
from opentelemetry.sdk import environment_variables as otel

from retry_scheduler import cli
from tests import document_names as names
from tests import vocabulary
from tests.documents import CHECKOUT, PAGES, RUNBOOK, Document, page
from tests.table import Table
from tests.vocabulary import PRODUCT, SENTENCES, SETTINGS

pytest_plugins = ("tests.fixtures",)

UNIT = CHECKOUT / "deployment" / "eracun-retry-scheduler.service"
SERVICES = "/opt/eracun/services/retry-scheduler"  # the versions, side by side

# Files that people edit, whose comments name things as documents do.
COMMENTED = (
    *(CHECKOUT / name for name in ("Makefile", "Dockerfile", "compose.yaml")),
    *sorted(path for path in UNIT.parent.rglob("*") if path.suffix in (".service", ".yml")),
)
COMMENTS = [
    Document(path, "\n".join(re.findall(r"(?:^|\s)#+ ?(.*)$", path.read_text(), re.MULTILINE)))
    for path in COMMENTED
]

# Written like names of ours, and somebody else's.
FOREIGN = {
    "ACCESS_REFUSED": "what RabbitMQ calls a refused login",
    "RABBITMQ_PASSWORD": "a variable of compose.yaml",
    "SSL_CERT_DIR": "OpenSSL's",
    "close_all_connections": "a command of rabbitmqctl",
    "start_app": "a command of rabbitmqctl",
    "stop_app": "a command of rabbitmqctl",
    "user_id": "a property of AMQP that we do not carry over",
    "x-death": "a header of RabbitMQ",
    "amq.default": "RabbitMQ's name for the default exchange",
    "archive_command": "a setting of PostgreSQL",
    "rule_files": "a setting of Prometheus",
    "rabbitmq_prometheus": "a plugin of RabbitMQ",
    "rabbitmq_queue_messages": "a metric of that plugin",
    "rabbitmq_alarms_memory_used_watermark": "a metric of that plugin",
    "rabbitmq_alarms_free_disk_space_watermark": "a metric of that plugin",
    "--stop-timeout": "an option of docker",
    "prometheus.yml": "the operator's file",
    "operations.jsonl": "written by the chaos test",
    "instance-N.M.log": "written by the chaos test",
    "dist.backup": "a folder of the first runbook",
}

Finder = Callable[[Document], Iterable[str]]


def named(find: Finder, documents: Iterable[Document] = PAGES) -> set[str]:
    return {name for document in documents for name in find(document)}


def unknown(find: Finder, known: Iterable[str], documents: Iterable[Document] = PAGES) -> set[str]:
    """Every name that does not exist, behind its document."""
    assert named(find, documents), "a pattern that finds nothing proves nothing"
    wrong = named(find, documents) - set(known) - FOREIGN.keys()
    return {f"{document}: {name}" for document in documents for name in find(document) if name in wrong}


@pytest.mark.parametrize("documents", [PAGES, COMMENTS], ids=["documents", "comments"])
def test_each_setting_and_metric_that_is_named_exists(documents: list[Document]) -> None:
    variables = (
        SETTINGS
        | vocabulary.read_variables("retry_scheduler")
        | vocabulary.read_variables("tests")
        | {name for name in vars(otel) if name.startswith("OTEL_")}  # the SDK for traces reads them
        | vocabulary.constants()  # which explanations of the code name
    )

    assert unknown(names.capitals, variables, documents) == set()
    assert unknown(names.metrics, vocabulary.metrics(), documents) == set()


def test_each_setting_and_metric_is_named() -> None:
    variables = SETTINGS | vocabulary.read_variables("retry_scheduler")

    assert variables - named(names.capitals) - named(lambda document: document.spans) == set()
    assert vocabulary.metrics() - named(names.small_names) == set()


def test_each_field_column_function_queue_and_header_that_is_named_exists() -> None:
    known = vocabulary.words() | vocabulary.metrics()

    assert unknown(names.small_names, known) == set()
    assert unknown(names.dotted_names, known) == set()
    assert unknown(names.headers, known) == set()


def test_each_sentence_of_the_log_that_is_named_is_said() -> None:
    """Its beginning is enough, as for a search."""
    texts = named(names.sentences)
    said = {
        text for text in texts for sentence in SENTENCES if re.match(rf"{re.escape(text)}(?!\w)", sentence)
    }

    assert unknown(names.sentences, said) == set()


def test_the_runbook_explains_each_sentence_of_the_log() -> None:
    rows = RUNBOOK.table("sentence", "level", "means", "what to do")

    assert sorted(sentence.strip("`") for sentence, *_ in rows) == sorted(SENTENCES)
    assert all(all(row) for row in rows)


def test_each_page_that_is_named_answers_and_each_that_answers_is_named() -> None:
    known = {
        way
        for port, paths in vocabulary.pages().items()
        for path in paths
        for way in (path, f":{port}{path}")
    }

    assert unknown(names.answers, known) == set()
    assert known - named(names.answers) == set()


def test_each_command_and_option_that_is_named_exists() -> None:
    ours = vocabulary.commands()
    everywhere = {"--help", "--version"}
    commands = {*ours, *(f"{command} {option}" for command in ours for option in ours[command])}

    assert unknown(names.invocations, commands | everywhere) == set()
    assert unknown(names.options, everywhere.union(*ours.values(), vocabulary.tool_options())) == set()


def test_the_contract_has_each_command_with_its_options_and_each_exit_code() -> None:
    contract = page("contract.md")
    rows = {
        command.strip("`").removeprefix("retry-scheduler "): set(re.findall(r"`(.+?)`", options))
        for command, options, _ in contract.table("command", "options", "what it does")
    }
    (codes,) = re.findall(r"^Exit codes: (.*?)\.", contract.text, re.MULTILINE)

    assert rows == vocabulary.commands()
    assert {int(code) for code in re.findall(r"\b\d+\b", codes)} == {
        int(value) for name, value in vars(cli).items() if name.startswith("EX_")
    }


def test_each_make_target_that_is_named_exists_and_each_that_exists_is_named() -> None:
    known = vocabulary.make_targets() | {f"{name}=" for name in vocabulary.make_variables()}

    assert unknown(names.makes, known) == set()
    assert vocabulary.make_targets() - named(names.makes) == set()


def test_each_alert_and_directive_that_is_named_exists_and_each_alert_is_named() -> None:
    known = vocabulary.alerts() | vocabulary.directives() | vocabulary.classes()

    assert unknown(names.camel_names, known) == set()
    assert vocabulary.alerts() - named(names.camel_names) == set()


def exists(path: str) -> bool:
    """From the checkout or the package on, or by its bare name in the package or in deployment/."""
    return any(list(folder.glob(path.rstrip("/"))) for folder in (CHECKOUT, PRODUCT)) or any(
        "/" not in path and list(folder.rglob(path)) for folder in (PRODUCT, UNIT.parent)
    )


@pytest.mark.parametrize("documents", [PAGES, COMMENTS], ids=["documents", "comments"])
def test_each_file_that_is_named_exists(documents: list[Document]) -> None:
    assert unknown(names.files, filter(exists, named(names.files, documents)), documents) == set()


def test_each_path_of_the_installation_is_one_that_the_unit_knows() -> None:
    installed = [path.rstrip("/") for path in re.findall(r"/(?:etc|opt)/\S+", UNIT.read_text())]
    paths = named(names.installed_files)
    known = {
        path for path in paths if path.startswith(SERVICES) or any(one.startswith(path) for one in installed)
    }

    assert unknown(names.installed_files, known) == set()


def test_each_link_leads_somewhere() -> None:
    broken = []
    for document in PAGES:
        for path, anchor in document.links:
            target = (document.path.parent / path).resolve() if path else document.path
            if not target.exists() or (anchor and anchor not in Document(target).anchors):
                broken.append(f"{document}: {path}#{anchor}")

    assert sum(len(document.links) for document in PAGES) > 50
    assert broken == []


def test_each_document_that_the_code_names_exists() -> None:
    sources = [*PRODUCT.rglob("*.py"), *PRODUCT.rglob("*.sql"), *(CHECKOUT / "deployment").rglob("*.yml")]
    mentioned = {name for path in sources for name in re.findall(r"\bdocs/[\w-]+\.md\b", path.read_text())}

    assert mentioned
    assert {name for name in mentioned if not (CHECKOUT / name).exists()} == set()


async def test_the_page_of_the_tables_has_each_table_column_and_index(migrated: Table) -> None:
    described = {
        table.strip("`"): [
            (column.strip("`"), kind) for column, kind, _ in text.table("column", "type", "meaning")
        ]
        for table, text in page("tables.md").chapters().items()
        if table.startswith("`")
    }
    described["retry_queue_archive"] = described["retry_queue"]  # "the same columns in the same order"
    columns = await migrated.fetch(
        "SELECT relname, attname, format_type(atttypid, NULL) AS kind"
        "  FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid"
        " WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'"
        "   AND attnum > 0 AND NOT attisdropped"
        " ORDER BY relname, attnum"
    )
    indexes = await migrated.fetch(
        "SELECT indexname, tablename FROM pg_indexes"
        " WHERE schemaname = current_schema() AND indexname LIKE 'idx%'"
    )
    there: dict[str, list[tuple[str, str]]] = {}
    for row in columns:
        kind = row["kind"].replace("timestamp with time zone", "timestamptz")
        there.setdefault(row["relname"], []).append((row["attname"], kind))

    assert described == there
    assert sorted(
        (index.strip("`"), table.strip("`"))
        for index, table, _ in page("tables.md").table("index", "table", "covers")
    ) == sorted(map(tuple, indexes))


async def test_each_statement_of_a_document_fits_the_tables(migrated: Table) -> None:
    statements = [
        (document, statement)
        for document in PAGES
        for statement in (*(block.text for block in document.statements), *names.statements(document))
    ]
    connection = await asyncpg.connect(migrated.database.dsn)
    try:
        for document, statement in statements:
            try:
                # Looks up every name, and changes nothing. A table of the page's own must be there, though.
                await connection.prepare(statement)
                if re.match(r"CREATE (?:TEMP |UNLOGGED )?TABLE", statement):
                    await connection.execute(statement)
            except asyncpg.PostgresError as error:
                pytest.fail(f"{document}: {statement}: {error}")
    finally:
        await connection.close()
    assert len(statements) >= 25


def test_each_foreign_name_is_still_needed() -> None:
    finders = (
        names.capitals,
        names.small_names,
        names.dotted_names,
        names.headers,
        names.options,
        names.files,
    )
    used = {name for find in finders for name in named(find) | named(find, COMMENTS)}

    assert FOREIGN.keys() - used == set()
