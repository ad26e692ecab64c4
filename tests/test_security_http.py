"""The pages and /metrics against whoever reaches their ports: proper answers, bounded cost, work goes on."""

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge, Metric
from prometheus_client.registry import Collector

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.http_api import build_app
from retry_scheduler.observability.metrics_server import MAX_CONNECTIONS, REQUEST_WITHIN_S, serve_metrics
from tests.contract import ANSWERS_WITHIN_S
from tests.factories import make_request
from tests.service_process import ServiceProcess, StartService
from tests.upstream import Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

ANOTHER_ADDRESS = "127.0.0.2"

CANARY = b"c4naryBird"
LONG_HEADER = b"X-Long: " + b"y" * 20_000 + b"\r\n"
MANY_HEADERS = b"".join(b"X-Header-%d: y\r\n" % number for number in range(200))
LARGE_BYTES = 6_000_000
GARBAGE = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03" + bytes(range(256)) + b"\r\n\r\n"

# What is sent, and with which codes it may be answered.
PAGES = [
    (b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"200"),
    (b"GET /health HTTP/1.0\n\n", b"200"),
    (b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n", b"200"),
    (b"GET /ready?x=" + CANARY + b" HTTP/1.0\r\n\r\n", b"200"),
    (b"GET /health/ HTTP/1.0\r\nHost: " + CANARY + b"\r\n\r\n", b"404"),
    (b"GET /" + CANARY + b"/../health HTTP/1.0\r\n\r\n", b"404"),
    (b"GET http://" + CANARY + b"/health HTTP/1.0\r\n\r\n", b"404"),
    (b"GET /%ff%00" + CANARY + b" HTTP/1.0\r\n\r\n", b"404"),
    (b"POST /health HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", b"405"),
    (b"DELETE /ready HTTP/1.0\r\n\r\n", b"405"),
    (CANARY + b" /health HTTP/1.0\r\n\r\n", b"405"),
    (b"GET /health\r\n\r\n", b"400"),  # HTTP/0.9
    (b"GET /health HTTP/1.1\r\n\r\n", b"400"),  # names no host
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"404"),
    (b"GET /health HTTP/1.0\r\n" + LONG_HEADER + b"\r\n", b"400"),
    (b"GET /" + b"y" * 20_000 + b" HTTP/1.0\r\n\r\n", b"400"),
    (b"GET /health HTTP/1.0\r\nContent-Length: -1\r\n\r\n", b"400"),
    (b"GET /health HTTP/1.0\r\nX: " + CANARY + b"\x00\r\n\r\n", b"400"),
    (GARBAGE, b"400"),
    # The request is good and its body is not: it must not be tried to answer twice.
    (b"POST /none HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + CANARY + b"\r\n", b"400"),
    (b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + CANARY + b"\r\n", b"400"),
]
METRICS = [
    (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
    (b"GET /metrics HTTP/1.0\n\n", b"200"),
    (b"GET /metrics?name[]=service_up HTTP/1.0\r\n\r\n", b"200"),
    (b"GET / HTTP/1.0\r\n\r\n", b"404"),
    (b"GET /" + CANARY + b" HTTP/1.0\r\n\r\n", b"404"),
    (b"GET http://" + CANARY + b"/metrics HTTP/1.0\r\n\r\n", b"404"),
    (b"POST /metrics HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", b"405"),
    (b"DELETE /metrics HTTP/1.0\r\n\r\n", b"405"),
    (CANARY + b" /metrics HTTP/1.0\r\n\r\n", b"405"),
    (b"GET /metrics\r\n\r\n", b"400"),
    (CANARY + b"\r\n\r\n", b"400"),
    (b"GET /metrics " + CANARY + b"\r\n\r\n", b"400"),
    (b"GET /metrics HTTP/2.0\r\n\r\n", b"505"),
    (b"GET /metrics HTTP/1.0\r\n" + LONG_HEADER + b"\r\n", b"431"),
    (b"GET /metrics HTTP/1.0\r\n" + MANY_HEADERS + b"\r\n", b"431"),
    (GARBAGE, b"400"),
]


def answer_to(port: int, words: bytes, *, half_close: bool = False) -> bytes:
    """Return all that comes back until the connection ends."""
    with socket.create_connection((LOOPBACK, port), timeout=10) as connection:
        connection.sendall(words)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionResetError):  # it was refused before all of it was read
            while piece := connection.recv(64 * 1024):
                answer += piece
        return answer


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """Return what comes until it ends like that."""
    answer = b""
    while not answer.endswith(end):
        piece = connection.recv(64 * 1024)
        assert piece, answer
        answer += piece
    return answer


async def test_every_request_gets_its_code_and_nothing_of_it_or_of_our_insides_comes_back(
    start_service: StartService,
) -> None:
    service = await start_service()

    for port, requests in ((service.http_port, PAGES), (service.metrics_port, METRICS)):
        for words, code in requests:
            answer = answer_to(port, words)
            head, _, body = answer.partition(b"\r\n\r\n")

            assert answer.split(b" ", 2)[1:2] == [code], (words[:80], answer[:200])
            if code != b"200":
                assert len(body) < 100
                assert not any(
                    telling in answer
                    for telling in (CANARY, b"Traceback", b".py", b"Python", b"<", b"uvicorn")
                )
            (allow,) = [line for line in head.splitlines() if line.lower().startswith(b"allow:")] or [b""]
            assert (b"GET" in allow) == (code == b"405")
            assert b"location:" not in head.lower()
    assert b"Python" not in answer_to(service.metrics_port, METRICS[0][0]).partition(b"\r\n\r\n")[0]
    assert {event["level"] for event in service.log_events()} == {"INFO"}


async def test_pipelined_requests_are_answered_in_turn_and_half_closed_connections_do_not_stay(
    start_service: StartService,
) -> None:
    service = await start_service()
    files = open_files(service)
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /none HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    answer = answer_to(service.http_port, request * 20 + last)
    broken = answer_to(service.http_port, request + GARBAGE)
    once = answer_to(service.metrics_port, METRICS[0][0] * 20)
    half_closed = answer_to(service.metrics_port, METRICS[0][0], half_close=True)
    for port in (service.http_port, service.metrics_port):
        for words in (b"", b"GET /met", request[:-2]):
            answer_to(port, words, half_close=True)

    assert answer.count(b"HTTP/1.1 200 ") == 20
    assert answer.count(b"HTTP/1.1 404 ") == 1
    assert broken.count(b"HTTP/1.1 200 ") <= 1
    assert once.count(b"HTTP/1.0 200 ") == 1
    assert half_closed.startswith(b"HTTP/1.0 200 ")
    await eventually(lambda: open_files(service) <= files)
    assert {event["level"] for event in service.log_events()} == {"INFO"}


async def test_a_connection_may_ask_for_long_and_one_that_breaks_off_after_its_answer_is_closed(
    start_service: StartService,
) -> None:
    service = await start_service()
    request = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Padding: " + b"y" * 1000 + b"\r\n\r\n"
    body_follows = b"POST /none HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    with socket.create_connection((LOOPBACK, service.http_port), timeout=10) as patient:
        for _ in range(50):  # together far more than one request may have
            patient.sendall(request)
            assert read_until(patient, b"}}}").startswith(b"HTTP/1.1 200 ")
        patient.sendall(body_follows)
        assert read_until(patient, b"Not Found").startswith(b"HTTP/1.1 404 ")
        patient.sendall(b"no chunk\r\n")
        with suppress(ConnectionResetError):
            assert patient.recv(64 * 1024) == b""

    assert {event["level"] for event in service.log_events()} == {"INFO"}


async def test_a_head_or_body_without_end_is_cut_off(start_service: StartService) -> None:
    service = await start_service()
    head = b"POST /health HTTP/1.1\r\nHost: x\r\n"
    header = b"X-Padding: " + b"y" * 1000 + b"\r\n"
    endless = (head, header * 50), (head + b"Content-Length: 1000000000000\r\n\r\n", b"y" * 50_000)

    for port in (service.http_port, service.metrics_port):
        for beginning, more in endless:
            began = time.monotonic()
            with (
                pytest.raises((ConnectionResetError, BrokenPipeError)),
                socket.create_connection((LOOPBACK, port), timeout=10) as connection,
            ):
                connection.sendall(beginning)
                while time.monotonic() - began < REQUEST_WITHIN_S * 2:
                    connection.sendall(more)
            assert time.monotonic() - began < REQUEST_WITHIN_S - 1  # before its time is over


async def test_the_ports_listen_where_the_setting_says_and_everywhere_by_default(
    start_service: StartService,
) -> None:
    inside = await start_service()  # HTTP_HOST is the loopback address here
    everywhere = await start_service(HTTP_HOST="")

    for service, is_heard in ((inside, False), (everywhere, True)):
        for port in (service.http_port, service.metrics_port):
            if is_heard:
                socket.create_connection((ANOTHER_ADDRESS, port), timeout=5).close()
            else:
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((ANOTHER_ADDRESS, port), timeout=5)


class Flood:
    """Strangers at both ports: those who speak slowly, those who talk nonsense, those who do not listen."""

    SLOW = 200  # at each port

    def __init__(self, service: ServiceProcess) -> None:
        self.attempts = 0
        self._ports = (service.http_port, service.metrics_port)
        self._stop = threading.Event()

    @contextmanager
    def raging(self) -> Iterator[None]:
        """Keep on until the block ends."""
        threads = [
            threading.Thread(target=work, args=(port,))
            for port in self._ports
            for work in (self._drip, self._rant)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(timeout=30)

    def _drip(self, port: int) -> None:
        with ExitStack() as opened:
            slow: list[socket.socket] = []
            while not self._stop.wait(0.1):
                while len(slow) < self.SLOW and not self._stop.is_set():
                    with suppress(OSError):
                        slow.append(
                            opened.enter_context(socket.create_connection((LOOPBACK, port), timeout=5))
                        )
                        slow[-1].sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\n")
                        self.attempts += 1
                for connection in list(slow):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        slow.remove(connection)
                        connection.close()

    def _rant(self, port: int) -> None:
        endless = b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + LONG_HEADER * 50
        whole = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        while not self._stop.is_set():
            for words in (GARBAGE, endless, b"\n" * 100_000, whole, whole * 500, b""):
                self.attempts += 1
                with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=5) as connection:
                    connection.sendall(words)  # and leave without waiting for an answer
            self._stop.wait(0.01)


def open_files(service: ServiceProcess) -> int:
    return len(list(Path(f"/proc/{service.pid}/fd").iterdir()))


def threads_of(service: ServiceProcess) -> int:
    return len(list(Path(f"/proc/{service.pid}/task").iterdir()))


async def test_a_flood_at_both_ports_stops_neither_retries_nor_a_normal_reader(
    start_service: StartService, upstream: Upstream
) -> None:
    service = await start_service(RABBITMQ_PREFETCH="500")
    upstream.declare("orders")
    files, memory_bytes = open_files(service), service.rss_bytes
    flood = Flood(service)
    took_s: list[float] = []
    most_files = most_threads = 0

    with flood.raging():
        await eventually(lambda: flood.attempts > 3 * Flood.SLOW, within=timedelta(seconds=20))
        upstream.ask_for_many([make_request() for _ in range(300)])
        for _ in range(10):
            page = service.ready()
            began = time.monotonic()
            metrics = service.metrics()
            took_s += [page.took_s, time.monotonic() - began]
            most_files = max(most_files, open_files(service))
            most_threads = max(most_threads, threads_of(service))
            assert (page.status, metrics.value("service_up")) == (200, 1)
        await upstream.receive("orders", 300, within=timedelta(seconds=15))

    assert max(took_s) < ANSWERS_WITHIN_S
    assert most_files <= files + 100 + MAX_CONNECTIONS + 5
    assert most_threads < 40
    assert service.rss_bytes < memory_bytes + 64 * 1024 * 1024
    assert {event["level"] for event in service.log_events()} == {"INFO"}
    await eventually(lambda: open_files(service) <= files + 2, within=timedelta(seconds=10))


async def test_a_bug_of_ours_shows_no_insides_to_who_asks() -> None:
    async def check() -> None:
        raise ZeroDivisionError(CANARY)

    class Broken(Collector):
        def describe(self) -> Iterator[Metric]:
            yield from ()

        def collect(self) -> Iterator[Metric]:
            raise ZeroDivisionError(CANARY)

    app = build_app("x", {"postgresql": check}, lambda: None, lambda: None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False)) as client:
        pages = [await client.get(f"http://x/{path}") for path in ("health", "ready")]
    registry = CollectorRegistry()
    registry.register(Broken())
    (port,) = free_ports(1)
    server = serve_metrics(registry, host=LOOPBACK, port=port, on_death=lambda error: None)
    try:
        metrics = answer_to(port, METRICS[0][0])
    finally:
        server.shutdown()
        server.server_close()

    assert [(page.status_code, page.text) for page in pages] == [(500, "Internal Server Error")] * 2
    assert metrics == b""


def test_readers_who_do_not_take_their_answer_make_room_for_those_who_do() -> None:
    registry = CollectorRegistry()
    Gauge("large", "y" * LARGE_BYTES, registry=registry)  # more than the kernel keeps for a reader
    deaths: list[Exception] = []
    (port,) = free_ports(1)
    server = serve_metrics(registry, host=LOOPBACK, port=port, on_death=deaths.append)
    with ExitStack() as opened:
        opened.callback(server.server_close)
        opened.callback(server.shutdown)
        readers = [opened.enter_context(socket.socket()) for _ in range(MAX_CONNECTIONS)]
        for deaf in readers:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((LOOPBACK, port))
            deaf.sendall(METRICS[0][0])
        for deaf in readers:
            assert deaf.recv(1) == b"H"  # its answer is on the way

        began = time.monotonic()
        with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=10) as answer:
            size = len(answer.read())

    assert size > LARGE_BYTES
    assert time.monotonic() - began < ANSWERS_WITHIN_S
    assert deaths == []
