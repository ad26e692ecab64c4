"""The log: the event texts of the contract with their fields, one JSON object a line whatever they hold."""

import json
from datetime import datetime, timedelta

from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.contract import OPERATIONS, TROUBLES
from tests.factories import make_request, new_id, request_fields
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

# Each would begin a line of its own, colour a terminal, or hide text, if it were written as it is.
INJECTION = (
    'x\n{"level":"ERROR","message":"Forged"}\r\n\v\f\x1c\x1d\x1e\x85\u2028{"message":"Forged"}\u2029'
    '\x1b[2J\x1b]0;title\x07\x9b31m\u202e\ufeff\ud83d"\\'
)


async def test_each_operation_is_logged_with_what_an_audit_needs(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service()
    upstream.declare("orders")
    retried, exhausted = new_id(), new_id()

    upstream.ask(
        make_request(message_id=retried, retry_count=1, error_reason="timeout"),
        make_request(message_id=exhausted, retry_count=3, error_reason="no such customer"),
    )
    await upstream.receive("orders", 1)
    await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(lambda: {event["message"] for event in service.log_events()} >= OPERATIONS.keys())

    audit = {
        retried: {"original_queue": "orders", "retry_count": 1, "error_reason": "timeout"},
        exhausted: {"original_queue": "orders", "retry_count": 3, "error_reason": "no such customer"},
    }
    seen: dict[str, list[str]] = {retried: [], exhausted: []}
    for event in service.log_events():
        if event["message"] in OPERATIONS:
            assert audit[event["message_id"]].items() <= event.items()
            assert event["level"] == OPERATIONS[event["message"]]
            seen[event["message_id"]].append(event["message"])
    assert seen == {
        retried: ["Retry scheduled", "Retry executed successfully"],
        exhausted: ["Retry scheduled", "Max retries exceeded - moved to manual review"],
    }
    due = {
        str(row["message_id"]): row["next_retry_at"] for row in await table.fetch("SELECT * FROM retry_queue")
    }
    for event in service.log_events("Retry scheduled"):
        assert datetime.fromisoformat(event["next_retry_at"]) == due[event["message_id"]]
    for event in service.log_events():
        assert datetime.fromisoformat(event["timestamp"]).utcoffset() == timedelta(0)
        assert event["service"] == "retry-scheduler"


async def test_each_trouble_that_the_runbook_searches_for_is_logged_while_a_server_is_away(
    start_service: StartService, upstream: Upstream, postgres: PrivatePostgres, rabbitmq: PrivateRabbitMQ
) -> None:
    service = await start_service()
    upstream.declare("orders")

    def seen() -> set[str]:
        return {event["message"] for event in service.log_events()}

    upstream.ask(make_request(retry_after_ms=1000))
    await eventually(lambda: "Retry scheduled" in seen())
    postgres.stop()
    upstream.ask(make_request())
    await eventually(
        lambda: (
            {"Failed to save retry task", "Failed to get due retry tasks", "PostgreSQL health check failed"}
            <= seen()
        ),
        within=timedelta(seconds=15),
    )
    postgres.start()
    await upstream.receive("orders", 2)
    rabbitmq.stop()
    await eventually(lambda: {"Failed to start RabbitMQ consumer", "Failed to connect to RabbitMQ"} <= seen())

    events = service.log_events()
    assert {event["message"]: event["level"] for event in events if event["message"] in TROUBLES} == TROUBLES
    assert all(event.get("error") for event in events if event["message"] in TROUBLES)


async def test_texts_that_would_forge_lines_give_one_line_each(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(MAX_PUBLISH_FAILURES="1", LOG_LEVEL="DEBUG")
    evil_queue = "q" + INJECTION.replace("\ud83d", "")[:60]
    bodies = [
        make_request(error_reason=INJECTION),
        make_request(error_reason=INJECTION, original_queue=evil_queue),
        make_request(error_reason="\x1b" * 9000, max_retries=0),
        make_request(message_id=INJECTION),
        json.dumps(request_fields() | {INJECTION: 1, "retry_count": INJECTION}).encode(),
        INJECTION.encode(errors="replace"),
    ]

    upstream.ask(*bodies)
    await upstream.receive(REVIEW_QUEUE, 6)
    await eventually(table.settled)
    await service.stop()

    text = service.log_text()
    assert "Forged" in text  # as a value, inside a line
    assert {event["message"] for event in service.log_events()} & {"Forged"} == set()
    # Also for readers that end a line at every character that Unicode knows for it.
    assert text.splitlines() == text.removesuffix("\n").split("\n")
    assert not [
        character
        for character in text
        if character != "\n" and (character < " " or "\x7f" <= character < "\xa0")
    ]
    assert all(character not in text for character in "\u202e\ufeff")
    assert max(len(line) for line in service.log_lines()) < 16 * 1024
    scheduled = service.log_events("Retry scheduled")
    assert {event["original_queue"] for event in scheduled} == {"orders", evil_queue}
    assert sum(event["error_reason"].startswith(INJECTION[:50]) for event in scheduled) == 2


async def test_the_level_and_the_name_of_the_service_follow_the_settings(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(LOG_LEVEL="WARNING", SERVICE_NAME="retries-of-team-7")
    upstream.declare("orders")

    upstream.ask(make_request(), make_request(max_retries=0))
    await upstream.receive("orders", 1)
    await eventually(table.settled)
    await service.stop()

    assert {event["level"] for event in service.log_events()} == {"WARNING"}
    assert {event["service"] for event in service.log_events()} == {"retries-of-team-7"}


async def test_a_reader_that_stops_reading_the_log_does_not_stop_retries_and_learns_what_it_has_missed(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    """Standard output is a file here; the file system says no to every write, as a full disk does."""
    service = await start_service()
    upstream.declare("orders")
    before = len(service.log_events())
    service.limit_file_size()

    upstream.ask_for_many([make_request() for _ in range(300)])
    await upstream.receive("orders", 300)
    await eventually(table.settled)
    await eventually(lambda: service.metrics().value("retry_log_lines_dropped_total") >= 600)
    service.lift_file_size_limit()
    last = new_id()
    upstream.ask(make_request(message_id=last))
    await upstream.receive("orders", 1)
    await eventually(lambda: len(service.log_events()) >= before + 3)

    assert service.metrics().value("retries_executed_total", status="success") == 301
    notice, *rest = service.log_events()[before:]
    assert (notice["message"], notice["level"]) == ("Log lines dropped", "WARNING")
    assert notice["lines"] == service.metrics().value("retry_log_lines_dropped_total")
    assert [event["message"] for event in rest if event.get("message_id") == last] == [
        "Retry scheduled",
        "Retry executed successfully",
    ]
    assert await service.stop() == 0
