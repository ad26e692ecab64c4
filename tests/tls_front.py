"""Speaks TLS on behalf of a PostgreSQL that was built without it, as PgBouncer or a load balancer does."""

import asyncio
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

from retry_scheduler.demo.ports import LOOPBACK

SSL_REQUEST = struct.pack(">II", 8, 80877103)

# What PostgreSQL itself says to a client in plain text where only TLS is allowed.
_FIELDS = b"SFATAL\0C28000\0Mno pg_hba.conf entry for this host, no encryption\0\0"
NO_ENCRYPTION = b"E" + struct.pack(">I", 4 + len(_FIELDS)) + _FIELDS


class TlsFront:
    """Listens on `port`, in a thread of its own, and passes on what comes encrypted; refuses the rest."""

    def __init__(self, make_context: Callable[[], ssl.SSLContext], *, to_port: int) -> None:
        """make_context: called for each connection, so that the certificate may change."""
        self.port = 0
        self.encrypted_connections = 0
        self._make_context = make_context
        self._to_port = to_port
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._work(),))

    def start(self) -> None:
        """Return once it listens."""
        self._thread.start()
        assert self._listening.wait(10)

    def stop(self) -> None:
        """Cut every connection and end."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _work(self) -> None:
        self._end = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, LOOPBACK, 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._end.wait()
        server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # Also for a client that does not like our certificate, or leaves in the middle of something.
            with suppress(OSError, asyncio.IncompleteReadError):
                if await reader.readexactly(8) != SSL_REQUEST:
                    writer.write(NO_ENCRYPTION)
                    await writer.drain()
                    return
                writer.write(b"S")
                await writer.drain()
                await writer.start_tls(self._make_context())
                self.encrypted_connections += 1
                onward_reader, onward_writer = await asyncio.open_connection(LOOPBACK, self._to_port)
                await asyncio.gather(_pass_on(reader, onward_writer), _pass_on(onward_reader, writer))
        finally:
            writer.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(64 * 1024):
            writer.write(piece)
            await writer.drain()
    finally:
        writer.close()
