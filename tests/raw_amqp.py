"""A publisher that sends whatever bytes it is told to as properties: what no client library can write.

The few frames of AMQP 0-9-1 that a publisher needs, over a blocking socket. With confirms, so that a
test knows what the broker has taken.
"""

import socket
import struct
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
FRAME_END = b"\xce"

CONNECTION_START, CONNECTION_START_OK = (10, 10), (10, 11)
CONNECTION_TUNE, CONNECTION_TUNE_OK = (10, 30), (10, 31)
CONNECTION_OPEN, CONNECTION_OPEN_OK = (10, 40), (10, 41)
CONNECTION_CLOSE, CONNECTION_CLOSE_OK = (10, 50), (10, 51)
CHANNEL_OPEN, CHANNEL_OPEN_OK, CHANNEL_CLOSE = (20, 10), (20, 11), (20, 40)
CONFIRM_SELECT, CONFIRM_SELECT_OK = (85, 10), (85, 11)
BASIC_PUBLISH, BASIC_ACK = (60, 40), (60, 80)

HEADERS_FLAG = 1 << 13
TIMESTAMP_FLAG = 1 << 6
MESSAGE_ID_FLAG = 1 << 7


class Refused(Exception):
    """The broker closed the channel or the connection."""


class RawPublisher:
    """One connection with one confirming channel."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        self._published = 0
        self._confirmed = 0

    def __enter__(self) -> Self:
        url = self._url
        self._socket = socket.create_connection((url.hostname or "", url.port or 5672), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self._socket.makefile("rb")
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self._expect(CONNECTION_START)
        login = f"\0{unquote(url.username or '')}\0{unquote(url.password or '')}".encode()
        answer = (
            struct.pack(">I", 0) + _short(b"PLAIN") + struct.pack(">I", len(login)) + login + _short(b"en_US")
        )
        self._method(0, CONNECTION_START_OK, answer)
        channel_max, self._frame_max, _ = struct.unpack(">HIH", self._expect(CONNECTION_TUNE))
        self._method(0, CONNECTION_TUNE_OK, struct.pack(">HIH", channel_max, self._frame_max, 0))
        self._method(0, CONNECTION_OPEN, _short(unquote(url.path[1:]).encode()) + b"\0\0")
        self._expect(CONNECTION_OPEN_OK)
        self._method(1, CHANNEL_OPEN, b"\0")
        self._expect(CHANNEL_OPEN_OK)
        self._method(1, CONFIRM_SELECT, b"\0")
        self._expect(CONFIRM_SELECT_OK)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._method(0, CONNECTION_CLOSE, struct.pack(">H", 200) + _short(b"") + struct.pack(">HH", 0, 0))
            self._expect(CONNECTION_CLOSE_OK)
        self._stream.close()
        self._socket.close()

    def publish(self, queue: str, properties: bytes, body: bytes) -> None:
        """Send one message and return once the broker has confirmed it. Raises Refused.

        properties: flags and values, exactly as they are to stand in the content header.
        """
        self._method(1, BASIC_PUBLISH, b"\0\0" + _short(b"") + _short(queue.encode()) + b"\0")
        self._frame(HEADER, 1, struct.pack(">HHQ", 60, 0, len(body)) + properties)
        piece = self._frame_max - 8
        for start in range(0, len(body), piece):
            self._frame(BODY, 1, body[start : start + piece])
        self._published += 1
        while self._confirmed < self._published:
            (self._confirmed,) = struct.unpack_from(">Q", self._expect(BASIC_ACK))

    def _method(self, channel: int, method: tuple[int, int], arguments: bytes) -> None:
        self._frame(METHOD, channel, struct.pack(">HH", *method) + arguments)

    def _frame(self, kind: int, channel: int, payload: bytes) -> None:
        self._socket.sendall(struct.pack(">BHI", kind, channel, len(payload)) + payload + FRAME_END)

    def _expect(self, method: tuple[int, int]) -> bytes:
        while True:
            head = self._stream.read(7)
            if len(head) < 7:
                raise Refused("the broker dropped the connection")
            kind, _, size = struct.unpack(">BHI", head)
            payload = self._stream.read(size + 1)[:-1]
            if kind == HEARTBEAT:
                continue
            came = struct.unpack_from(">HH", payload)
            if came in (CONNECTION_CLOSE, CHANNEL_CLOSE):
                raise Refused(payload[7 : 7 + payload[6]].decode())
            if came == method:
                return payload[4:]
            raise Refused(f"expected {method}, got {came}")


def header(name: bytes, tag: bytes, value: bytes) -> bytes:
    """Return one entry of a header table. tag: the one-letter type; value: as it follows the tag."""
    return _short(name) + tag + value


def long_string(value: bytes) -> bytes:
    """Return what follows the tag S."""
    return struct.pack(">I", len(value)) + value


def properties_with_headers(*entries: bytes) -> bytes:
    """Return properties that consist of a header table."""
    table = b"".join(entries)
    return struct.pack(">HI", HEADERS_FLAG, len(table)) + table


def properties_with_timestamp(seconds: int) -> bytes:
    """Return properties that consist of a timestamp: any 64 bits."""
    return struct.pack(">HQ", TIMESTAMP_FLAG, seconds % 2**64)


def properties_with_message_id(value: bytes) -> bytes:
    """Return properties that consist of a message id: any bytes."""
    return struct.pack(">H", MESSAGE_ID_FLAG) + _short(value)


def _short(value: bytes) -> bytes:
    return bytes((len(value),)) + value
