"""Traces: spans in a real OTLP receiver, linked to their requests, and no harm if it takes nothing."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.observability import events, tracing
from retry_scheduler.observability.tracing import MAX_WAITING_SPANS, Tracing, start_tracing
from tests.collector import HANGING, OK, Collector, Link, collector
from tests.contract import LATE_AT_MOST_S, STOPS_WITHIN_S
from tests.factories import PAYLOAD, make_request, new_id
from tests.service_process import PROJECT, StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

CONFIG = 78

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
TRACESTATE = "vendor=opaque,other=1"
THEIR_LINK = Link(TRACE_ID, SPAN_ID)

SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}


@pytest.fixture
def receiver() -> Iterator[Collector]:
    """A collector that takes everything."""
    with collector() as running:
        yield running


async def test_each_publication_is_a_span_that_links_to_the_context_that_the_consumer_gets(
    start_service: StartService, upstream: Upstream, table: Table, receiver: Collector
) -> None:
    service = await start_service(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, SERVICE_NAME="retries-of-team-7", **SOON
    )
    upstream.declare("orders")
    traced, untraced, odd, exhausted = (new_id() for _ in range(4))

    upstream.ask(
        make_request(message_id=traced, retry_count=1),
        headers={"traceparent": TRACEPARENT, "tracestate": TRACESTATE},
    )
    upstream.ask(make_request(message_id=untraced))
    upstream.ask(make_request(message_id=odd), headers={"traceparent": "00-not-a-context"})
    upstream.ask(
        make_request(message_id=exhausted, max_retries=0),
        headers={"traceparent": TRACEPARENT, "tracestate": TRACESTATE},
    )
    messages = {message.message_id: message for message in await upstream.receive("orders", 3)}
    await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(
        lambda: (
            len(receiver.named("publish orders")) == 3 and len(receiver.named(f"publish {REVIEW_QUEUE}")) == 1
        )
    )

    # What comes back carries what came in, traced here or not.
    trace_headers = {
        name: {key: value for key, value in messages[name].headers.items() if key.startswith("trace")}
        for name in messages
    }
    assert trace_headers == {
        traced: {"traceparent": TRACEPARENT, "tracestate": TRACESTATE},
        untraced: {},
        odd: {"traceparent": "00-not-a-context"},
    }
    spans = {span.attributes["messaging.message.id"]: span for span in receiver.named("publish orders")}
    assert {name: span.links for name, span in spans.items()} == {traced: [THEIR_LINK], untraced: [], odd: []}
    span = spans[traced]
    assert (span.kind, span.parent_span_id, span.failed) == ("CLIENT", "", False)
    assert len({span.trace_id for span in spans.values()} | {TRACE_ID}) == 4  # each a trace of its own
    assert 0 < span.ended_ns - span.began_ns < LATE_AT_MOST_S * 1e9
    assert abs(span.ended_ns - time.time_ns()) < 60e9
    attributes = dict(span.attributes)
    assert 0 < attributes.pop("retry_scheduler.late_ms") < LATE_AT_MOST_S * 1000
    assert attributes == {
        "messaging.system": "rabbitmq",
        "messaging.destination.name": "orders",
        "messaging.rabbitmq.destination.routing_key": "orders",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.message.id": traced,
        "messaging.message.body.size": len(PAYLOAD),
        "retry_scheduler.original_queue": "orders",
        "retry_scheduler.retry_count": 1,
        "retry_scheduler.retry_id": f"{traced}:1",
    }
    (review,) = receiver.named(f"publish {REVIEW_QUEUE}")
    assert (review.links, review.failed) == ([THEIR_LINK], False)
    assert review.attributes["retry_scheduler.review_reason"] == "exhausted"
    assert review.attributes["retry_scheduler.original_queue"] == "orders"
    assert span.resource["service.name"] == "retries-of-team-7"
    (starting,) = service.log_events(events.STARTING)
    assert span.resource["service.instance.id"] == starting["instance"]


async def test_each_batch_taken_in_is_one_span_that_links_to_its_requests(
    start_service: StartService, upstream: Upstream, table: Table, receiver: Collector
) -> None:
    await start_service(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        OTEL_SERVICE_NAME="named by the standard variable",
        RABBITMQ_PREFETCH="500",
        **SOON,
    )
    upstream.declare("orders")

    upstream.ask(make_request(), b"{}", make_request(), headers={"traceparent": TRACEPARENT})
    upstream.ask_for_many([make_request() for _ in range(300)])
    await upstream.receive("orders", 302)
    await eventually(table.settled)

    def batches() -> list[int]:
        return [
            span.attributes["messaging.batch.message_count"]
            for span in receiver.named(f"process {RETRY_QUEUE}")
        ]

    await eventually(lambda: sum(batches()) == 303)
    spans = receiver.named(f"process {RETRY_QUEUE}")
    assert len(spans) < 150  # one for each of 303 requests would cost as much as storing them
    assert {span.kind for span in spans} == {"CONSUMER"}
    links = [link for span in spans for link in span.links]
    assert links == [THEIR_LINK] * 2
    assert sum(span.attributes["retry_scheduler.quarantined"] for span in spans) == 1
    assert spans[0].attributes["messaging.destination.name"] == RETRY_QUEUE
    assert spans[0].attributes["messaging.operation.type"] == "process"
    assert all(span.began_ns < span.ended_ns for span in spans)
    assert spans[0].resource["service.name"] == "named by the standard variable"


async def test_a_publication_that_does_not_arrive_is_a_span_that_has_failed_and_says_how(
    start_service: StartService, upstream: Upstream, table: Table, receiver: Collector
) -> None:
    service = await start_service(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, MAX_PUBLISH_FAILURES="2")

    upstream.ask(make_request(original_queue="nowhere"))
    await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(table.settled)
    await service.stop()  # which sends what waits

    failed = receiver.named("publish nowhere")
    assert [span.attributes["error.type"] for span in failed] == ["returned", "returned"]
    assert all(span.failed for span in failed)
    (review,) = receiver.named(f"publish {REVIEW_QUEUE}")
    assert review.attributes["retry_scheduler.review_reason"] == "unroutable"
    assert "error.type" not in review.attributes


async def test_the_standard_variables_for_sampling_decide_which_spans_are_made(
    start_service: StartService, upstream: Upstream, table: Table, receiver: Collector
) -> None:
    service = await start_service(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        OTEL_TRACES_SAMPLER="parentbased_traceidratio",
        OTEL_TRACES_SAMPLER_ARG="0.5",
        RABBITMQ_PREFETCH="500",
    )
    upstream.declare("orders")

    upstream.ask_for_many([make_request() for _ in range(400)])
    await upstream.receive("orders", 400)
    await eventually(table.settled)
    await service.stop()

    # Binomial, 10 standard deviations of 400 throws on each side.
    assert 100 < len(receiver.named("publish orders")) < 300


@pytest.mark.parametrize("answer", [None, HANGING, 500, 503], ids=["away", "hanging", "500", "503"])
async def test_a_collector_that_takes_nothing_costs_no_message_no_stop_and_one_line_a_minute(
    start_service: StartService, upstream: Upstream, table: Table, answer: int | None
) -> None:
    (nobody,) = free_ports(1)
    with collector(answer or HANGING) as receiver:
        endpoint = receiver.endpoint if answer is not None else f"http://{LOOPBACK}:{nobody}"
        service = await start_service(
            OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, RABBITMQ_PREFETCH="500", OTEL_BSP_SCHEDULE_DELAY="20"
        )
        upstream.declare("orders")

        for _ in range(3):
            upstream.ask_for_many([make_request() for _ in range(500)])
        await upstream.receive("orders", 1500)
        await eventually(table.settled)
        if answer is not None:
            await eventually(lambda: receiver.requests > 0)
        await eventually(lambda: service.log_events(events.SPANS_LOST), within=timedelta(seconds=15))
        metrics = service.metrics()
        began_s = time.monotonic()
        exit_code = await service.stop()
        took_s = time.monotonic() - began_s

    assert exit_code == 0
    assert took_s < STOPS_WITHIN_S
    assert await table.statuses() == {"retried": 1500}
    assert upstream.depth("orders") == 0
    assert metrics.value("retry_lateness_seconds_bucket", le="5.0") == 1500
    (line,) = service.log_events(events.SPANS_LOST)
    assert line["level"] == "WARNING"
    assert line["spans"] >= 1
    expected = {
        None: "cannot connect",
        HANGING: "no answer in time",
        500: "answered 500",
        503: "answered 503",
    }
    assert expected[answer] in line["problem"]
    assert {event["level"] for event in service.log_events()} == {"INFO", "WARNING"}
    assert not [event for event in service.log_events() if "logger" in event]  # the SDK itself is silent


def trace_one(by: Tracing) -> None:
    now_ns = time.time_ns()
    by.published(
        message_id=new_id(),
        original_queue="orders",
        retry_count=0,
        retry_id="id:0",
        review_reason=None,
        outcome="confirmed",
        late_s=0.0,
        body_bytes=1,
        traceparent=TRACEPARENT,
        began_ns=now_ns,
        ended_ns=now_ns,
    )


def start_for(receiver: Collector, monkeypatch: pytest.MonkeyPatch) -> Tracing:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    return start_tracing(
        service_name="test", instance="test", retry_queue=RETRY_QUEUE, manual_review_queue=REVIEW_QUEUE
    )


def exporting_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("OtelBatch")}


async def test_spans_that_wait_for_a_hanging_collector_are_bounded_and_closing_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "EXPORT_TIMEOUT_S", 60.0)
    monkeypatch.setattr(tracing, "COMPLAIN_EVERY_S", 0.0)
    with collector(HANGING) as receiver, capture_logs() as lines:
        others = exporting_threads()
        spans = start_for(receiver, monkeypatch)
        trace_one(spans)
        await eventually(lambda: receiver.requests == 1)

        for _ in range(2 * MAX_WAITING_SPANS):
            trace_one(spans)
        spans.close()

        # Both still wait for the collector, and a process that ends waits for neither.
        (exporting,) = exporting_threads() - others
        (flushing,) = (thread for thread in threading.enumerate() if thread.name == "last spans")
        assert exporting.daemon
        assert flushing.daemon
        receiver.answer = OK
        receiver.released.set()
        await eventually(lambda: not exporting.is_alive(), within=timedelta(seconds=10))

    too_many = [line for line in lines if "faster than the collector" in line["problem"]]
    # One was under way, and it waits as well.
    assert sum(line["spans"] for line in too_many) == 2 * MAX_WAITING_SPANS - (MAX_WAITING_SPANS - 1)
    assert len(receiver.spans) <= MAX_WAITING_SPANS


async def test_a_collector_that_comes_back_gets_the_spans_that_are_made_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with collector(500) as receiver, capture_logs() as lines:
        spans = start_for(receiver, monkeypatch)
        for number in range(1, 6):
            trace_one(spans)
            await eventually(lambda number=number: receiver.requests == number)  # type: ignore[misc]
        receiver.answer = OK
        trace_one(spans)
        await eventually(lambda: len(receiver.spans) == 1)
        spans.close()

    # And the rest in a minute.
    assert [(line["event"], line["spans"]) for line in lines] == [(events.SPANS_LOST, 1)]


async def test_a_bug_in_making_a_span_is_a_lost_span_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with collector() as receiver, capture_logs() as lines:
        spans = start_for(receiver, monkeypatch)
        monkeypatch.setattr(tracing, "_link", fail)
        trace_one(spans)
        spans.stored([TRACEPARENT], messages=1, quarantined=0, began_ns=time.time_ns())
        spans.close()

    assert [line["problem"] for line in lines] == ["they could not be made: RuntimeError"]
    assert receiver.spans == []


def run_until_it_finds_its_port_taken(
    *interpreter: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run the service until everything is put together, and no further."""
    with socket.create_server((LOOPBACK, 0)) as taken:
        return subprocess.run(
            [sys.executable, *interpreter],
            cwd=PROJECT,
            env={
                "PATH": os.environ["PATH"],
                "HTTP_HOST": LOOPBACK,
                "HTTP_PORT": str(taken.getsockname()[1]),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def test_without_a_collector_nothing_of_opentelemetry_is_loaded(receiver: Collector) -> None:
    program = ("-X", "importtime", "-m", "retry_scheduler", "run")

    off = run_until_it_finds_its_port_taken(*program)
    on = run_until_it_finds_its_port_taken(*program, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)

    assert [done.returncode for done in (off, on)] == [CONFIG, CONFIG]
    assert all("HTTP_PORT: cannot listen" in done.stderr for done in (off, on))
    for library in ("opentelemetry", "urllib3", "google.protobuf"):
        assert library not in off.stderr
        assert library in on.stderr


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_collector_without_the_extra_is_told_with_78_and_what_to_install(command: str) -> None:
    without = f"""
import sys
sys.modules["opentelemetry"] = None  # importing it fails as if it were not installed
from retry_scheduler.cli import main
sys.exit(main(["{command}"]))
"""

    done = run_until_it_finds_its_port_taken(
        "-c", without, OTEL_EXPORTER_OTLP_ENDPOINT="http://localhost:4318"
    )

    assert done.returncode == CONFIG
    (line,) = done.stderr.splitlines()
    assert line.startswith("retry-scheduler: bad setting: OTEL_EXPORTER_OTLP_ENDPOINT: ")
    assert "retry-scheduler[tracing]" in line


def test_a_variable_that_the_sdk_refuses_is_told_with_78(receiver: Collector) -> None:
    done = run_until_it_finds_its_port_taken(
        *("-m", "retry_scheduler", "run"),
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        OTEL_BSP_SCHEDULE_DELAY="0",
    )

    assert done.returncode == CONFIG
    (line,) = done.stderr.splitlines()
    assert "OTEL_*: schedule_delay_millis must be positive" in line


def test_the_document_names_every_attribute() -> None:
    document = (PROJECT / "docs" / "tracing.md").read_text()
    source = Path(tracing.__file__).read_text()

    names = {word for word in source.split('"') if word.startswith(("messaging.", "retry_scheduler."))}
    assert len(names) > 10
    assert sorted(name for name in names if f"`{name}`" not in document) == []
