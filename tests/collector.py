"""A collector of traces as a service meets it: OTLP over HTTP, decoded with OpenTelemetry's own classes."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from retry_scheduler.demo.ports import LOOPBACK

OK = 200
# Takes the request and never answers.
HANGING = 0


@dataclass(frozen=True)
class Link:
    """What a span points at, in the digits of a traceparent."""

    trace_id: str
    span_id: str


@dataclass(frozen=True)
class Span:
    """One span that came. resource: attributes of the program it came from."""

    name: str
    kind: str
    trace_id: str
    parent_span_id: str
    attributes: dict[str, Any]
    links: list[Link]
    failed: bool
    began_ns: int
    ended_ns: int
    resource: dict[str, Any]


class Collector:
    """Keeps what was sent to it. Made by `collector`."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.requests = 0
        self.spans: list[Span] = []
        self.released = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                answer = outer.take(self.path, body)
                if answer == HANGING:
                    outer.released.wait()
                    self.close_connection = True
                    return
                content = ExportTraceServiceResponse().SerializeToString()
                self.send_response(answer)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="collector")
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """What OTEL_EXPORTER_OTLP_ENDPOINT should be."""
        return f"http://{LOOPBACK}:{self._server.server_address[1]}"

    def named(self, name: str) -> list[Span]:
        """The spans of this name that have come so far."""
        return [span for span in list(self.spans) if span.name == name]

    def take(self, path: str, body: bytes) -> int:
        """Take one request in and return what to answer."""
        with self._lock:
            self.requests += 1
            if self.answer == OK:
                assert path == "/v1/traces"
                self.spans += _spans(ExportTraceServiceRequest.FromString(body))
            return self.answer

    def close(self) -> None:
        """Let those go that wait for an answer, and end."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def collector(answer: int = OK) -> Iterator[Collector]:
    """A collector that answers with this status, or HANGING."""
    running = Collector(answer)
    try:
        yield running
    finally:
        running.close()


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for resource_spans in request.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield Span(
                    name=span.name,
                    kind=WireSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    trace_id=span.trace_id.hex(),
                    parent_span_id=span.parent_span_id.hex(),
                    attributes=_attributes(span.attributes),
                    links=[Link(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                    failed=span.status.code == Status.STATUS_CODE_ERROR,
                    began_ns=span.start_time_unix_nano,
                    ended_ns=span.end_time_unix_nano,
                    resource=resource,
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
