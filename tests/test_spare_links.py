"""Links that are lent to one borrower at a time, on a real broker."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

import retry_scheduler.broker.spare_links as spare_links_module
from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.broker.spare_links import SpareLinks
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.test_hanging_queue import suspended
from tests.test_publish_link import publication
from tests.upstream import Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)


class Borrowing(SpareLinks):
    """Remembers what it has made."""

    def __init__(self, make: Callable[[], PublishLink]) -> None:
        self.made: list[PublishLink] = []

        def make_and_remember() -> PublishLink:
            self.made.append(make())
            return self.made[-1]

        super().__init__(make_and_remember)

    async def send(self, queue: str) -> Outcome:
        """Borrow a link for one publication."""
        async with self.lent() as link:
            await eventually(lambda: link.ready)
            (outcome,) = await link.publish([publication(queue, "1:0")])
            return outcome


@pytest.fixture
async def links(broker_url: str) -> AsyncIterator[Borrowing]:
    made = Borrowing(lambda: PublishLink(broker_url, queues=(), name="spare", on_problem=lambda _: None))
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert not [link for link in made.made if link.up]


async def test_one_borrower_after_the_other_gets_the_same_link_and_two_at_a_time_have_two(
    links: Borrowing, upstream: Upstream
) -> None:
    upstream.declare("orders")

    assert [await links.send("orders") for _ in range(5)] == [Outcome.CONFIRMED] * 5
    assert len(links.made) == 1

    async with links.lent() as first, links.lent() as second:
        assert first is not second
    assert len(links.made) == 2


async def test_a_link_that_was_given_back_in_the_middle_of_something_is_not_lent_again(
    links: Borrowing, upstream: Upstream, rabbitmq: PrivateRabbitMQ, vhost: str
) -> None:
    upstream.declare("hanging")

    with suspended(rabbitmq, vhost, "hanging"):
        async with links.lent() as link:
            await eventually(lambda: link.ready)
            publishing = asyncio.create_task(link.publish([publication("hanging", "1:0")]))
            await eventually(lambda: not link.at_rest)
        with pytest.raises(ZeroDivisionError):
            async with links.lent() as other:
                await eventually(lambda: other.ready)
                raise ZeroDivisionError
        async with links.lent() as third:
            assert len({link, other, third}) == 3
        assert await publishing == [Outcome.UNKNOWN]


async def test_a_link_whose_connection_has_ended_meanwhile_is_not_lent_again(
    links: Borrowing, upstream: Upstream, rabbitmq: PrivateRabbitMQ
) -> None:
    upstream.declare("orders")
    await links.send("orders")
    (link,) = links.made

    rabbitmq.ctl("close_all_connections", "--global", "test")
    await eventually(lambda: not link.ready)

    assert await links.send("orders") is Outcome.CONFIRMED
    assert len(links.made) == 2


async def test_a_link_that_nobody_borrows_is_closed_after_a_while(
    links: Borrowing, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_links_module, "KEPT_S", 0.05)
    upstream.declare("orders")

    await links.send("orders")

    await eventually(lambda: not links.made[0].up)
    assert await links.send("orders") is Outcome.CONFIRMED
