"""Whatever stands in a text, an event is one line of JSON, at most 16 KiB, with nothing in it that acts."""

import json
import subprocess
import sys
from datetime import timedelta

from tests.factories import make_request, request_fields
from tests.service_process import PROJECT, StartService
from tests.table import Table
from tests.upstream import REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

LINE_MAX_BYTES = 16 * 1024
MIB = 1024 * 1024

NASTY = {
    "line ends": 'x\r\n{"level": "ERROR", "message": "Forged"}\n\v\f\x1c\x1d\x1e\x85\u2028\u2029',
    "a terminal's commands": "\x1b[2J\x1b]0;title\x07\x9b31m\b\x7f",
    "NUL": "before\0after",
    "changes of direction": "\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\ufeff",
    "formats": "%s %d %(name)s %n {} {0.__class__} {name!r} ${HOME} $(id)",
    "half an emoji": "\ud83d and \udcff",
    "quotes": "\"'}]\\",
}
LONG = {f"1 MiB of {name}": (text * (MIB // len(text) + 1))[:MIB] for name, text in NASTY.items()}

# Logs every text in every way that the service has, and says on standard error how many events that was.
LOGS_EVERYTHING = """
import json, logging, sys
import structlog
from retry_scheduler.observability import logs

logs.set_up_logs("DEBUG", service="x")
log = structlog.get_logger()
events = 0
for text in json.load(sys.stdin):
    log.info("Event", error_reason=text)
    log.warning("Event", error=text, reason=text)
    log.info("Event", nested=[{"text": text}, text])
    logs.info_lines("Event", [{"error_reason": text, "original_queue": text[:255]}] * 2)
    logging.getLogger("library").warning("%s", text)
    logging.getLogger("library").error(text)
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("Event")
        logging.getLogger("library").exception("Event")
    events += 9
logs.flush_logs()
print(events, file=sys.stderr)
"""


def assert_harmless(line: bytes) -> None:
    assert len(line) <= LINE_MAX_BYTES
    text = line.decode()
    assert isinstance(json.loads(text), dict)
    assert text.splitlines() == [text]  # also for readers that know all of Unicode's line ends
    assert not [
        character
        for character in text
        if character < " " or "\x7f" <= character < "\xa0" or character in NASTY["changes of direction"]
    ]


def test_each_way_to_log_gives_one_harmless_line_whatever_the_text_is() -> None:
    texts = [*NASTY.values(), *LONG.values()]

    done = subprocess.run(
        [sys.executable, "-c", LOGS_EVERYTHING],
        cwd=PROJECT,
        input=json.dumps(texts).encode(),
        capture_output=True,
        timeout=60,
        check=True,
    )

    lines = done.stdout.removesuffix(b"\n").split(b"\n")
    assert len(lines) == int(done.stderr) == 9 * len(texts)
    for line in lines:
        assert_harmless(line)
    assert {json.loads(line)["message"] for line in lines} & {"Forged"} == set()


LOGS_LISTS = """
import structlog
from retry_scheduler.observability import logs

logs.set_up_logs("INFO", service="x")
structlog.get_logger().info("Event", whole=list("a" * 20), cut=tuple(range(33)), text="b" * 2000)
logs.flush_logs()
"""


def test_a_list_or_a_text_that_was_cut_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOGS_LISTS], cwd=PROJECT, capture_output=True, timeout=60, check=True
    )

    event = json.loads(done.stdout)
    assert event["whole"] == ["a"] * 20
    assert event["cut"] == [*range(20), "... 13 more"]
    assert event["text"] == "b" * 1024 + "..."


async def test_what_strangers_send_gives_one_harmless_line_for_each_event(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    settings = {"MAX_PUBLISH_FAILURES": "1", "LOG_LEVEL": "DEBUG", "SERVICE_NAME": "\n\x1b[2J\u2028x"}
    service = await start_service(**settings)
    upstream.declare("orders")
    long = LONG["1 MiB of line ends"]
    stored, malformed = [], []
    for text in (*NASTY.values(), long):
        queue = text.encode(errors="ignore").decode().replace("\0", "")[:60]
        stored += [
            make_request(error_reason=text),
            make_request(error_reason=text, max_retries=0),
            make_request(error_reason=text, original_queue=queue),
        ]
        malformed += [
            *(make_request(**{name: text}) for name in ("message_id", "original_payload", "retry_count")),
            json.dumps(request_fields() | {"max_retries": "x", text: text}).encode(),
            b"{" + text.encode(errors="replace"),
            text.encode("utf-8", errors="surrogatepass"),
        ]

    upstream.ask(*stored, *malformed, headers={"traceparent": NASTY["line ends"], "tracestate": "\x1b[2J"})
    delivered = len(stored) // 3
    await upstream.receive("orders", delivered)
    await upstream.receive(REVIEW_QUEUE, 2 * delivered + len(malformed), within=timedelta(seconds=20))
    await eventually(table.settled)
    await service.stop()

    for line in service.log_lines():
        assert_harmless(line)
    count = {
        message: len(service.log_events(message))
        for message in ("Retry scheduled", "Retry executed successfully", "Malformed request quarantined")
    }
    assert count == {
        "Retry scheduled": len(stored),
        "Retry executed successfully": delivered,
        "Malformed request quarantined": len(malformed),
    }
    assert service.log_events("Forged") == []
