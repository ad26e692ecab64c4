"""A TCP proxy in front of a server, that loses, delays, cuts and holds back what passes through it.

It runs in a thread with a loop of its own, so that a test that waits for a page does not stop it.
Every fault is in force when its method returns, for connections that exist and for new ones, until
`heal`. What is held back arrives when the link is healed, unless its connection has ended since.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from types import TracebackType
from typing import Any, Self

from retry_scheduler.demo.ports import LOOPBACK

# Read at a time; small enough that a fault comes into force in the middle of a batch.
PIECE_BYTES = 16 * 1024
# What is on its way in one direction of a connection: with a delay of 0.4 s, up to 2.5 MB/s.
PIECES_UNDER_WAY = 64
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER for 0 s: what closes sends RST


class Way(Enum):
    """Which way bytes go."""

    TO_SERVER = "to server"
    TO_CLIENT = "to client"


class Proxy:
    """Listens on 127.0.0.1 and connects each client to one server.

    port: where clients connect; the same as long as the proxy lives.
    accepted: how many connections it has taken in its life. A loop without pauses shows here.
    """

    def __init__(self, port: int) -> None:
        """port: the server's, on this machine."""
        self._server_port = port
        self._listener = _listening(0)
        self.port = int(self._listener.getsockname()[1])
        self.accepted = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy for port {port}")
        self._connections: set[asyncio.Task[None]] = set()
        self._forgotten: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._flowing = {way: asyncio.Event() for way in Way}
        self._latency_s = 0.0
        self._bytes_per_s = 0.0
        self._slice_bytes = PIECE_BYTES
        self._left_bytes: dict[Way, int] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        self.heal()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    @property
    def connections(self) -> int:
        """How many connections there are now."""
        return len(self._connections)

    def heal(self) -> None:
        """Pass everything on at once, and take new connections. What was forgotten is cut."""

        async def heal() -> None:
            await _cancelled(self._forgotten)
            self._latency_s = self._bytes_per_s = 0.0
            self._slice_bytes = PIECE_BYTES
            self._left_bytes.clear()
            for flowing in self._flowing.values():
                flowing.set()
            if self._accepting is None:
                if self._listener.fileno() < 0:
                    self._listener = _listening(self.port)
                self._accepting = self._loop.create_task(self._accept())

        self._run(heal())

    def refuse(self) -> None:
        """Cut every connection with RST, and refuse new ones."""

        async def refuse() -> None:
            if self._accepting is not None:
                await _cancelled({self._accepting})
                self._accepting = None
                self._listener.close()
            await _cancelled(self._connections)

        self._run(refuse())

    def reset(self) -> None:
        """Cut every connection with RST. New ones are taken."""
        self._run(_cancelled(self._connections))

    def hold(self, *ways: Way) -> None:
        """Keep the connections, and move nothing: in these directions, or without any in both."""

        async def hold() -> None:
            for way in ways or Way:
                self._flowing[way].clear()

        self._run(hold())

    def forget(self) -> None:
        """Never again move anything on the connections that there are, as a firewall that has lost its state.

        New ones are passed on. Healing does not bring the forgotten ones back: it cuts them.
        """

        async def forget() -> None:
            self._forgotten = set(self._connections)

        self._run(forget())

    def slow_down(self, *, latency_s: float = 0, bytes_per_s: float = 0, slice_bytes: int = 0) -> None:
        """Delay everything, limit the speed of each direction, or pass so many bytes at a time."""

        async def slow_down() -> None:
            self._latency_s = latency_s
            self._bytes_per_s = bytes_per_s
            self._slice_bytes = slice_bytes or PIECE_BYTES

        self._run(slow_down())

    def cut_after(self, count: int, way: Way) -> None:
        """Pass `count` more bytes in one direction, all connections together; cut the one with the next byte.

        Happens once. With 0 and TO_CLIENT the server has acted, and its answer is lost.
        """

        async def cut_after() -> None:
            self._left_bytes[way] = count

        self._run(cut_after())

    @property
    def has_cut(self) -> bool:
        """Whether what `cut_after` waited for has happened."""
        return not self._left_bytes

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _accept(self) -> None:
        somebody_comes = asyncio.Event()
        self._loop.add_reader(self._listener, somebody_comes.set)
        try:
            while True:
                await somebody_comes.wait()
                somebody_comes.clear()
                # Not awaited: what is accepted in the moment of a cancellation would be lost, and stay open.
                with suppress(BlockingIOError):
                    while True:
                        self._take(self._listener.accept()[0])
        finally:
            self._loop.remove_reader(self._listener)

    def _take(self, client: socket.socket) -> None:
        self.accepted += 1
        connection = self._loop.create_task(self._serve(client))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        # One that is cut before it has begun closes nothing by itself.
        connection.add_done_callback(lambda _: client.close())

    async def _serve(self, client: socket.socket) -> None:
        with client, socket.socket() as server:
            client.setblocking(False)
            server.setblocking(False)
            try:
                await self._flowing[Way.TO_SERVER].wait()
                await self._loop.sock_connect(server, (LOOPBACK, self._server_port))
                connection = asyncio.current_task()
                async with asyncio.TaskGroup() as pumps:
                    pumps.create_task(self._pump(connection, client, server, Way.TO_SERVER))
                    pumps.create_task(self._pump(connection, server, client, Way.TO_CLIENT))
            except (asyncio.CancelledError, OSError, ExceptionGroup):
                # Cut here, by one end, or the server is away: both ends learn it as a RST.
                for end in (client, server):
                    with suppress(OSError):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    async def _pump(
        self, connection: asyncio.Task[None] | None, source: socket.socket, target: socket.socket, way: Way
    ) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES_UNDER_WAY)

        async def take() -> None:
            data = b"something"
            while data:
                await self._way_is_free(connection, way)  # until then it stays with the sender
                data = await self._loop.sock_recv(source, PIECE_BYTES)
                await under_way.put((self._loop.time() + self._latency_s, data))

        async def pass_on() -> None:
            data = b"something"
            while data:
                arrives_s, data = await under_way.get()
                await asyncio.sleep(max(arrives_s - self._loop.time(), 0))
                for start in range(0, len(data), self._slice_bytes):
                    await self._way_is_free(connection, way)
                    await self._send(target, data[start : start + self._slice_bytes], way)
            await self._way_is_free(connection, way)
            target.shutdown(socket.SHUT_WR)

        async with asyncio.TaskGroup() as both:
            both.create_task(take())
            both.create_task(pass_on())

    async def _send(self, target: socket.socket, piece: bytes, way: Way) -> None:
        left = self._left_bytes.get(way, len(piece))
        await self._loop.sock_sendall(target, piece[:left])
        if len(piece) > left:
            self._left_bytes.pop(way, None)
            raise ConnectionAbortedError("cut here")
        if way in self._left_bytes:
            self._left_bytes[way] -= len(piece)
        if self._bytes_per_s:
            await asyncio.sleep(len(piece) / self._bytes_per_s)

    async def _way_is_free(self, connection: asyncio.Task[None] | None, way: Way) -> None:
        await self._flowing[way].wait()
        if connection in self._forgotten:
            await asyncio.Event().wait()  # for ever


@contextmanager
def proxies(*ports: int) -> Iterator[tuple[Proxy, ...]]:
    """One proxy for each server's port, while the block runs."""
    with ExitStack() as running:
        yield tuple(running.enter_context(Proxy(port)) for port in ports)


async def _cancelled(tasks: set[asyncio.Task[None]]) -> None:
    ended = set(tasks)
    for task in ended:
        task.cancel()
    await asyncio.gather(*ended, return_exceptions=True)


def _listening(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    listener.listen(100)
    listener.setblocking(False)
    return listener
