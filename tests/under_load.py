"""A service under a steady load while a test breaks something, and the accounts afterwards.

The load has always something due in the next seconds, so that the first retry after an outage tells
how long recovering took.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic, time

from chaos.proxy import Proxy
from retry_scheduler.demo.ports import LOOPBACK
from retry_scheduler.observability import events
from tests.contract import HEALED_WITHIN_S
from tests.factories import encoded, make_request, new_id
from tests.service_process import ServiceProcess
from tests.table import Table
from tests.upstream import Load, Message, Upstream
from tests.waiting import eventually

# Takes a figure that a test has measured.
Report = Callable[[str, object], None]

# What the log says when a link is lost, and at each try to make it anew.
INTAKE_LOST = events.CONSUMER_FAILED
PUBLISHER_LOST = events.RABBITMQ_FAILED

# One request of ten waits so long; the others come back at once.
SOME_WAIT = timedelta(seconds=2)

# What the log says about a server that is away, as opposed to what it says about each message.
SERVER_COMPLAINTS = {
    INTAKE_LOST,
    PUBLISHER_LOST,
    events.POSTGRES_FAILED,
    events.SAVE_FAILED,
    events.CLAIM_FAILED,
}


def requests(*, payload_bytes: int = 100) -> Iterator[tuple[str, bytes]]:
    """Yield ids and requests without end; the payload of each is its own (`payload_of`)."""
    number = 0
    while True:
        number += 1
        message_id = new_id()
        later = {"retry_after_ms": int(SOME_WAIT.total_seconds() * 1000)} if number % 10 == 0 else {}
        payload = encoded(payload_of(message_id, payload_bytes))
        yield (
            message_id,
            make_request(message_id=message_id, original_payload=payload, max_retries=1000, **later),
        )


def payload_of(message_id: str, payload_bytes: int) -> bytes:
    """Return the payload of one request: bytes that belong to this message alone."""
    return hashlib.shake_128(message_id.encode()).digest(payload_bytes)


def copies(messages: Sequence[Message]) -> int:
    """How many publications were not the first one under their key."""
    return len(messages) - len({message.retry_id for message in messages})


def executed(services: Sequence[ServiceProcess]) -> float:
    """How many retries have been confirmed, by all of these instances together."""
    return sum(service.metrics().value("retries_executed_total", status="success") for service in services)


async def flowing(
    *services: ServiceProcess, count: int = 50, within: timedelta = timedelta(seconds=10)
) -> None:
    """Wait until `count` more retries have been confirmed."""
    before = executed(services)
    await eventually(lambda: executed(services) >= before + count, within=within)


async def accounts(
    load: Load,
    upstream: Upstream,
    table: Table,
    services: Sequence[ServiceProcess],
    *,
    payload_bytes: int = 100,
    most_copies: int | None = None,
    exactly_once: bool = False,
    within: timedelta = timedelta(seconds=40),
) -> list[Message]:
    """End the load, wait until all is settled, and return what has come to the queue `orders`.

    Asserts that nothing is lost, that every body is whole, and that each attempt has ended well.
    most_copies: how many duplicates there may be. Without it, every one must be explained by a
    publication which one of `services` itself counts as unknown.
    exactly_once: no duplicate, and no request taken for one that its upstream has sent again.
    """
    load.finish()
    wanted = set(load.accepted)
    stored = "SELECT count(DISTINCT message_id) FROM retry_queue WHERE message_id = ANY($1::uuid[])"

    async def all_settled() -> bool:
        return await table.settled() and await table.value(stored, list(wanted)) == len(wanted)

    await eventually(all_settled, within=within, every=timedelta(milliseconds=100))
    messages = upstream.take("orders")
    assert wanted - {message.message_id for message in messages} == set(), "lost"
    for message in messages:
        assert message.body == payload_of(message.message_id, payload_bytes)
    assert (await table.statuses()).keys() == {"retried"}
    if most_copies is None:
        most_copies = int(
            sum(service.metrics().value("retry_publications_unknown_total") for service in services)
        )
    assert copies(messages) <= most_copies
    assert not exactly_once or len(messages) == len(wanted) == len(load.accepted)
    return messages


async def first_retry_s(table: Table, since: float, *, within: timedelta = timedelta(seconds=10)) -> float:
    """Return how many seconds after the Unix time `since` the first retry was confirmed and settled."""
    moment = datetime.fromtimestamp(since, UTC)
    settled = "SELECT min(finished_at) FROM retry_queue WHERE status = 'retried' AND finished_at > $1"
    first = await eventually(lambda: table.value(settled, moment), within=within)
    return round(float((first - moment).total_seconds()), 2)


class Watch:
    """What one instance does from now on."""

    def __init__(self, service: ServiceProcess) -> None:
        self._service = service
        self._began_s = time()
        self._cpu_s = _cpu_s(service.pid)

    @property
    def lasted_s(self) -> float:
        """Seconds since the watch began."""
        return time() - self._began_s

    @property
    def cpu_share(self) -> float:
        """How much of one core the process has used."""
        return (_cpu_s(self._service.pid) - self._cpu_s) / self.lasted_s

    def complaints(self) -> Counter[str]:
        """How often the log has complained about a server, by message."""
        return Counter(message for _, message, _ in self._complaints())

    def said(self) -> str:
        """Every problem that the complaints have named, in one text."""
        return "\n".join(error for _, _, error in self._complaints())

    def first_complaint_s(self, message: str) -> float | None:
        """How long it took until the log said `message`; None if it has not."""
        moments = [moment for moment, said, _ in self._complaints() if said == message]
        return round(moments[0] - self._began_s, 1) if moments else None

    def assert_calm(self) -> None:
        """Assert that no loop ran hot: neither in the log nor on the processor."""
        # A handful of quick tries, then one a second from each of those that need the server.
        at_most = 8 + 2 * self.lasted_s
        assert all(count <= at_most for count in self.complaints().values()), self.complaints()
        assert self.lasted_s < 3 or self.cpu_share < 0.5

    async def stays_calm_until(self, lasted_s: float) -> None:
        """Assert that no loop runs hot until the watch has lasted so long: that takes time."""
        await eventually(lambda: self.lasted_s > lasted_s, within=timedelta(seconds=lasted_s + 5))
        self.assert_calm()

    def _complaints(self) -> Iterator[tuple[float, str, str]]:
        for event in self._service.log_events():
            moment = datetime.fromisoformat(event["timestamp"]).timestamp()
            if event["message"] in SERVER_COMPLAINTS and moment >= self._began_s:
                yield moment, event["message"], str(event.get("error"))


def open_files(service: ServiceProcess) -> int:
    """How many files and sockets the process has open."""
    return len(list(Path(f"/proc/{service.pid}/fd").iterdir()))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def through(proxy: Proxy, vhost: str) -> str:
    """Return the address of a virtual host behind a proxy."""
    return f"amqp://guest:guest@{LOOPBACK}:{proxy.port}/{vhost}"


async def ready_again(*services: ServiceProcess) -> float:
    """Return after how many seconds all of them were ready; at most HEALED_WITHIN_S."""
    began = monotonic()
    for service in services:
        await service.wait_until_ready(within=timedelta(seconds=HEALED_WITHIN_S))
    return round(monotonic() - began, 2)
