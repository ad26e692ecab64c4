"""Cancelled at any await, the service ends at once, and what it had in hand is delivered by another one.

The service cancels its loops when a server keeps them from ending, and the event loop cancels whatever is
left. Whoever swallows that (a wait that takes it for its own timeout, a loop that takes it for an error)
makes a process that does not end.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from structlog.testing import capture_logs

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.service import Service
from retry_scheduler.settings import Settings, load_settings
from tests.command import settings_for
from tests.factories import encoded, make_request, new_id
from tests.servers import Database
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Load, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

# By the names that the service gives them: taking in, claiming, publishing and settling, and so on.
TASKS = ("consumer", "scheduler", "delivery", "quarantine", "beat")
STEPS = range(1, 13)
SIDE_BY_SIDE = 4

# Links, pages and pool have 7 s to say goodbye.
ENDS_WITHIN_S = 10.0
SEED = 93

QUICK = {
    "BASE_DELAY_MS": "20",
    "MAX_DELAY_MS": "100",
    "JITTER_MS": "10",
    "MAX_PUBLISH_FAILURES": "2",
    "POSTGRES_POOL_MIN": "2",
    "RABBITMQ_PREFETCH": "20",
}

Report = Callable[[str, object], None]


@dataclass
class Instance:
    """All tasks of one service, and at which suspension of the task `target` they are cancelled.

    everything: all of them, as the event loop does at its end. Otherwise the loops, as the service does.
    """

    target: str
    step: int
    everything: bool
    tasks: "list[asyncio.Task[Any]]" = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    _suspensions: int = 0

    def suspended(self, name: str) -> None:
        """Note that a task of this name waits for something."""
        self._suspensions += name == self.target
        if self._suspensions == self.step and not self.cancelled.is_set():
            asyncio.get_running_loop().call_soon(self.cancel)  # before what it waits for can come

    def cancel(self) -> None:
        """Cancel what is to be cancelled, once."""
        if not self.cancelled.is_set():
            self.cancelled.set()
            for task in self.tasks:
                if self.everything or task.get_name() == "loops":
                    task.cancel()


_instance: ContextVar[Instance | None] = ContextVar("_instance", default=None)


class Counted(Coroutine[Any, Any, Any]):
    """A task's coroutine that tells each time it is suspended."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], instance: Instance) -> None:
        self._coroutine = coroutine
        self._instance = instance

    def send(self, value: Any) -> Any:
        return self._noting(self._coroutine.send(value))

    def throw(self, *error: Any) -> Any:
        return self._noting(self._coroutine.throw(*error))

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def _noting(self, awaited: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._instance.suspended(task.get_name())
        return awaited


def counting_tasks(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
) -> "asyncio.Task[Any]":
    """Make a task; if one of an instance makes it, it belongs to that instance."""
    instance = _instance.get()
    if instance is None:
        return asyncio.Task(coroutine, loop=loop, **options)
    task = asyncio.Task(Counted(coroutine, instance), loop=loop, **options)
    instance.tasks.append(task)
    return task


async def run_and_cancel(instance: Instance, settings: Settings) -> None:
    """Run a service until it has been cancelled and nothing of it is left."""
    _instance.set(instance)
    running = asyncio.create_task(Service(settings).run(), name="service")
    _instance.set(None)
    await asyncio.wait((running, asyncio.ensure_future(instance.cancelled.wait())), timeout=20)
    assert instance.cancelled.is_set(), f"{instance.target} was not suspended {instance.step} times"
    _, late = await asyncio.wait((running,), timeout=ENDS_WITHIN_S)
    left = [task for task in instance.tasks if not task.done()]
    for task in left:  # as the event loop does at its end
        task.cancel()
    if left:
        _, later = await asyncio.wait(left, timeout=ENDS_WITHIN_S)
        late |= later
    assert not late, f"they go on: {[task.get_name() for task in late]}"
    assert running.cancelled() or running.exception() is None


class Traffic:
    """Requests of every kind, without end, by what must become of them."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        previous = new_id()
        for number in count():
            message_id = new_id()
            match number % 8:
                case 3:
                    self.kinds[message_id] = "exhausted"
                    yield message_id, make_request(message_id=message_id, max_retries=0)
                case 4:
                    self.kinds[message_id] = "malformed"
                    yield message_id, message_id.encode()
                case 5:
                    self.kinds[message_id] = "unroutable"
                    yield message_id, make_request(message_id=message_id, original_queue="nowhere")
                case 6:
                    yield previous, make_request(message_id=previous)
                case _:
                    previous = message_id
                    self.kinds[message_id] = "good"
                    yield message_id, make_request(message_id=message_id)


@pytest.mark.timeout(180)
async def test_cancelled_at_any_await_every_task_ends_and_nothing_is_lost_or_held_for_ever(
    start_service: StartService,
    database: Database,
    broker_url: str,
    upstream: Upstream,
    table: Table,
    record_property: Report,
) -> None:
    upstream.declare("orders", RETRY_QUEUE, REVIEW_QUEUE)
    dice = random.Random(SEED)
    instances = [Instance(task, step, everything=dice.random() < 0.5) for task in TASKS for step in STEPS]
    dice.shuffle(instances)
    waiting, traffic = iter(instances), Traffic()
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_task_factory(counting_tasks)  # type: ignore[arg-type]
    loop.set_exception_handler(lambda _, context: complaints.append(context))

    async def one_after_the_other() -> None:
        for instance in waiting:
            http_port, metrics_port = free_ports(2)
            ports = {"HTTP_HOST": LOOPBACK, "HTTP_PORT": str(http_port), "METRICS_PORT": str(metrics_port)}
            await run_and_cancel(instance, load_settings(settings_for(database, broker_url) | QUICK | ports))

    with capture_logs() as events, Load(upstream, traffic, per_second=200) as load:
        async with asyncio.TaskGroup() as lanes:
            for _ in range(SIDE_BY_SIDE):
                lanes.create_task(one_after_the_other())
    loop.set_task_factory(None)
    await start_service(MAX_PUBLISH_FAILURES="2", RABBITMQ_PREFETCH="1000")
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0, within=timedelta(seconds=20))
    await eventually(table.settled, within=timedelta(seconds=20))

    wanted: dict[str, set[str]] = {"good": set(), "exhausted": set(), "unroutable": set(), "malformed": set()}
    for message_id in load.accepted:
        wanted[traffic.kinds[message_id]].add(message_id)
    found: dict[str, set[str]] = {kind: set() for kind in wanted}
    found["good"] = {message.message_id for message in upstream.take("orders")}
    for message in upstream.take(REVIEW_QUEUE):
        found[message.review["reason"]].add(
            message.review["message_id"] or message.review["original_payload"]
        )
    wanted["malformed"] = {encoded(message_id.encode()) for message_id in wanted["malformed"]}
    record_property("requests", len(load.accepted))
    assert found == wanted
    assert [event for event in events if "exc_info" in event or event["log_level"] == "critical"] == []
    assert complaints == []
