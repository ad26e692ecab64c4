"""pika's connection with many frames in one system call, each way, and a short way for messages.

As it comes, pika sends every frame with a call of its own (three for a message) and reads 4 KiB at a
time, copying what is left after each frame. Measured with 1 KiB messages, a third of the service's
processor time went there, and the broker pays for every small packet too.

Messages take the short way of `frames` where they can. The rest, and whatever looks odd, is pika's.
"""

import asyncio
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from pika import frame
from pika.adapters.asyncio_connection import AsyncioConnection, _AsyncioIOServicesAdapter

from retry_scheduler.broker.frames import message_frames, whole_delivery

# Large enough for a few dozen messages, small enough not to keep the event loop from its timers.
_READ_BYTES = 128 * 1024

_HEADER_BYTES = 7
_END_BYTES = 1


class Services(_AsyncioIOServicesAdapter):  # type: ignore[misc]  # pika has no types
    """What pika needs of the event loop, but for a peer that resets in the moment of connecting.

    Then pika raises in a callback of the event loop. Whoever connects would hear of it by their own
    timeout, and the log would have a traceback.
    """

    def create_streaming_connection(
        self, protocol_factory: Any, sock: Any, on_done: Callable[[Any], None], **options: Any
    ) -> Any:
        """Return something with `cancel`; `on_done` is told the transport and the protocol, or an error."""
        try:
            return super().create_streaming_connection(protocol_factory, sock, on_done, **options)
        except (OSError, ValueError):
            reset = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            return self.call_later(0, partial(on_done, reset))


class WireConnection(AsyncioConnection):  # type: ignore[misc]  # pika has no types
    """An AMQP connection that can hold frames back to send them together.

    on_delivery: takes (delivery tag, redelivered, encoded properties, body) of what arrives whole for
    the connection's only consumer; the others come through pika, and both in the broker's order.
    """

    on_delivery: Callable[[int, bool, bytes, bytes], None] | None = None

    _held: list[bytes] | None = None
    _read_since_look_bytes = 0
    _frame_buffer: bytes

    @classmethod
    def create_connection(
        cls,
        connection_configs: Sequence[Any],
        on_done: Callable[[Any], None],
        custom_ioloop: asyncio.AbstractEventLoop | None = None,
        workflow: Any = None,
    ) -> Any:
        """As pika's, with our Services."""
        services = Services(custom_ioloop)
        return cls._start_connection_workflow(
            connection_configs=connection_configs,
            connection_factory=lambda parameters: cls(
                parameters=parameters, custom_ioloop=services, internal_connection_workflow=False
            ),
            nbio=services,
            workflow=workflow,
            on_done=on_done,
        )

    def read_in_large_pieces(self) -> None:
        """Ask the socket for more at a time; call it once, when the connection is open."""
        self._transport._MAX_RECV_BYTES = _READ_BYTES

    @contextmanager
    def together(self) -> Iterator[None]:
        """Send what is written inside as one piece, at the end. Nothing may be awaited inside."""
        held: list[bytes] = []
        self._held = held
        try:
            yield
        finally:
            self._held = None
            if held and self.is_open:
                self._adapter_emit_data(b"".join(held))

    def publish(self, channel: int, queue: str, properties: bytes, body: bytes) -> None:
        """Send a mandatory message through the default exchange. Raises ValueError: nothing was written."""
        self._output_marshaled_frames(message_frames(channel, queue, properties, body, self._body_max_length))

    def _output_marshaled_frames(self, marshaled_frames: Sequence[bytes]) -> None:
        if self._held is None:
            super()._output_marshaled_frames((b"".join(marshaled_frames),))
        else:
            self._held += marshaled_frames

    def _look_again(self) -> None:
        if self._transport is not None:
            self._transport._on_socket_readable()  # which passes over a connection that has ended

    def _on_data_available(self, data_in: bytes) -> None:
        self._read_since_look_bytes += len(data_in)
        if self._read_since_look_bytes >= self._transport._MAX_CONSUME_BYTES:
            # pika leaves what is more for the next event. uvloop tells of a reset in one event, its last:
            # if that brings so much data, nobody would ever learn that the connection has ended.
            self._read_since_look_bytes = 0
            asyncio.get_running_loop().call_soon(self._look_again)
        buffer = self._frame_buffer + data_in if self._frame_buffer else data_in
        offset, end = 0, len(buffer)
        while end - offset >= _HEADER_BYTES:
            size = (
                int.from_bytes(buffer[offset + 3 : offset + _HEADER_BYTES], "big")
                + _HEADER_BYTES
                + _END_BYTES
            )
            if end - offset < size:
                break
            if self.on_delivery is not None and (found := whole_delivery(buffer, offset)) is not None:
                tag, redelivered, properties, body, after = found
                self.bytes_received += after - offset
                offset = after
                self.on_delivery(tag, redelivered, properties, body)
                continue
            _, value = frame.decode_frame(buffer[offset : offset + size])
            offset += size
            # Before handling it: a frame that ends the connection leaves the buffer to nobody.
            self._frame_buffer = b""
            self.bytes_received += size
            self._process_frame(value)
        self._frame_buffer = buffer[offset:]
