"""pika's connection on the event loop that the service runs on."""

import array
import asyncio
import fcntl
import socket
import termios
import time
from collections.abc import Callable

import uvloop

from chaos.proxy import Proxy, Way, proxies
from retry_scheduler.broker.connection import Connection, connect
from retry_scheduler.broker.wire import Services
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.contract import HEALED_WITHIN_S
from tests.under_load import through
from tests.upstream import Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

# What pika reads at most before it lets others work.
ONE_TURN_BYTES = 100 * 1024
TCP_CLOSED = 7


def while_nothing_runs(condition: Callable[[], bool]) -> None:
    """Hold up the event loop until `condition` is true."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)  # noqa: TID251  the event loop must not run meanwhile


def unread_bytes(sock: socket.socket) -> int:
    found = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.FIONREAD, found)
    return found[0]


def is_reset(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSED


async def lose_with_much_unread(connection: Connection, link: Proxy) -> str:
    """Have the connection reset while more waits than is read in one turn; return what is told about it."""
    transport = connection._raw._transport
    sock = transport._sock
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * ONE_TURN_BYTES)
    taken: list[int] = []
    connection.deliver_to(lambda *delivery: taken.append(len(delivery[3])))
    await connection.call(connection.channel.basic_qos, prefetch_count=100)
    link.hold(Way.TO_CLIENT)
    connection.channel.basic_consume("orders", lambda *_: None)
    await eventually(lambda: transport.get_write_buffer_size() == 0)
    link.heal()
    while_nothing_runs(lambda: unread_bytes(sock) > 2 * ONE_TURN_BYTES)
    link.reset()
    while_nothing_runs(lambda: is_reset(sock))

    async with asyncio.timeout(HEALED_WITHIN_S):
        return await asyncio.shield(connection.closed)


def test_a_reset_is_seen_at_once_though_more_has_arrived_than_is_read_in_one_turn(
    rabbitmq: PrivateRabbitMQ, vhost: str, upstream: Upstream
) -> None:
    """uvloop tells of a reset once. If data is read then, and the rest left for the next time, none comes."""
    upstream.declare("orders")
    upstream.ask_for_many([b"x" * 10_000] * 100, queue="orders")

    async def scenario(link: Proxy) -> str:
        connection = await connect(through(link, vhost), name="test")
        try:
            return await lose_with_much_unread(connection, link)
        finally:
            connection.cut("the test is over")

    with proxies(rabbitmq.port) as (link,):
        assert "reset" in uvloop.run(scenario(link))


async def test_a_peer_that_resets_in_the_moment_of_connecting_fails_the_try_at_once() -> None:
    """The socket was connected when the event loop said so, and is not when pika asks who is there."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[object] = loop.create_future()
    gone = socket.socket()
    gone.setblocking(False)

    Services(loop).create_streaming_connection(lambda: None, gone, on_done=told.set_result)

    async with asyncio.timeout(5):
        assert isinstance(await told, ConnectionResetError)
    assert gone.fileno() < 0
