"""One connection to the broker: what it asks is answered to whoever asked, and none is left open."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from retry_scheduler.broker import connection as connection_module
from retry_scheduler.broker.connection import Connection, connect
from retry_scheduler.broker.wire import WireConnection
from retry_scheduler.errors import Unavailable
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)


class Channel:
    """Keeps one callback for the answer, as pika does; the test answers."""

    def __init__(self) -> None:
        self.is_open = True
        self.asked = 0
        self.answer: Callable[[bool], None] = lambda _: None

    def add_on_close_callback(self, _: object) -> None:
        pass

    def flow(self, active: bool, *, callback: Callable[[bool], None]) -> None:
        self.asked += 1
        self.answer = callback


class Raw:
    """A connection of pika's that nothing happens to."""

    def __getattr__(self, _: str) -> Any:
        return lambda *_: None


async def test_an_answer_that_comes_late_is_not_taken_for_that_to_a_later_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    channel = Channel()
    connection = Connection(cast(WireConnection, Raw()), channel)
    with monkeypatch.context() as impatient:
        impatient.setattr(connection_module, "CALL_TIMEOUT_S", 0.05)
        with pytest.raises(Unavailable):
            await connection.round_trip()

    later = [asyncio.create_task(connection.round_trip()) for _ in range(3)]
    await asyncio.wait(later, timeout=0.05)
    asked_before_the_answer = channel.asked
    channel.answer(True)
    await eventually(lambda: channel.asked == 2)
    done_by_the_late_answer = any(trip.done() for trip in later)
    channel.answer(True)
    await asyncio.gather(*later)

    assert asked_before_the_answer == 1
    assert not done_by_the_late_answer
    assert channel.asked == 2


async def test_whoever_gives_up_while_a_channel_opens_leaves_no_connection_behind(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[WireConnection] = []
    monkeypatch.setattr(WireConnection, "channel", lambda self, **_: opened.append(self))

    connecting = asyncio.create_task(connect(broker_url, name="test"))
    await eventually(lambda: opened)
    connecting.cancel()
    await asyncio.gather(connecting, return_exceptions=True)

    await eventually(lambda: opened[0].is_closed)
