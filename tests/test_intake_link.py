"""The consuming link on a real broker: whoever is told to stop gets nothing more that nobody stores."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from retry_scheduler.broker.connection import Connection
from retry_scheduler.broker.intake_link import IntakeLink
from tests.upstream import Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)


@pytest.mark.parametrize("step", ["basic_qos", "basic_consume"])
async def test_a_stop_while_consuming_begins_leaves_nothing_that_nobody_takes(
    broker_url: str, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What is given back comes again marked as redelivered, which the contract takes for a repetition."""
    upstream.declare("requests")
    upstream.ask_for_many([b"x"] * 5, queue="requests")
    link = IntakeLink(
        broker_url, queue="requests", queues=(), prefetch=10, name="test", on_problem=lambda problem: None
    )
    stopped: list[asyncio.Task[int]] = []
    call = Connection.call

    async def stop_and_take() -> int:
        await link.stop_consuming()
        return len(link.take_arrived())

    async def stop_meanwhile(
        self: Connection, start: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Any:
        if getattr(start, "__name__", "") == step:
            stopped.append(asyncio.create_task(stop_and_take()))
        return await call(self, start, *arguments, **options)

    monkeypatch.setattr(Connection, "call", stop_meanwhile)
    running = asyncio.create_task(link.run())
    await eventually(lambda: stopped)
    taken = await stopped[0]
    for _ in range(50):  # what is asked for has been answered by then, and sent
        await link.round_trip()
    taken_too_late = len(link.take_arrived())
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    assert taken_too_late == 0
    await eventually(lambda: upstream.depth("requests") == 5)
    assert [message.redelivered for message in upstream.take("requests")] == [True] * taken + [False] * (
        5 - taken
    )
