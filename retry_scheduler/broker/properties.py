"""Message properties and header tables as the bytes on the wire.

pika's own decoder cuts floats to integers and loses the connection over an odd timestamp, so that
one such message is redelivered for ever (pika/pika#1698). Here nothing is decoded on arrival: the
class below is entered in pika's registry of property classes and keeps the bytes as they came.

Field types: https://www.rabbitmq.com/amqp-0-9-1-errata#section_3
"""

import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache

from pika import spec

# Property flags of class basic, in the order of their fields.
_CONTENT_TYPE = 1 << 15
_CONTENT_ENCODING = 1 << 14
_HEADERS = 1 << 13
_DELIVERY_MODE = 1 << 12
_MESSAGE_ID = 1 << 7

_PERSISTENT = b"\x02"

_START = struct.Struct(">H")
_LENGTH = struct.Struct(">I")
_TEXT = struct.Struct(">cI")
_NUMBER = struct.Struct(">cq")

# Bytes that follow each one-letter type tag; the others begin with their own length or are tables.
_FIXED_WIDTHS = {
    b"t": 1, b"b": 1, b"B": 1, b"s": 2, b"u": 2, b"U": 2, b"I": 4, b"i": 4, b"f": 4,
    b"l": 8, b"L": 8, b"d": 8, b"T": 8, b"D": 5, b"V": 0,
}  # fmt: skip
_LENGTH_PREFIXED = (b"S", b"x", b"A", b"F")


class RawProperties(spec.BasicProperties):  # type: ignore[misc]  # pika has no types
    """Properties of one message, encoded. pika calls `decode` for arrivals and `encode` to send."""

    def __init__(self, raw: bytes = b"\0\0") -> None:
        self.raw = raw

    def decode(self, encoded: bytes, offset: int = 0) -> "RawProperties":
        """Keep the bytes; never raise, whatever they are."""
        self.raw = encoded[offset:]
        return self

    def encode(self) -> list[bytes]:
        """Give the same bytes back."""
        return [self.raw]


spec.props[spec.BasicProperties.INDEX] = RawProperties


def encode_properties(
    headers: Mapping[str, str | int], *, message_id: str | None = None, content_type: str | None = None
) -> bytes:
    """Return the properties of a persistent message.

    headers: in the order to be sent; text becomes a long string, a number a signed 64-bit integer.
    Raises ValueError if a name, message_id or content_type is over 255 bytes.
    """
    flags = _HEADERS | _DELIVERY_MODE
    before, after = b"", b""
    if content_type is not None:
        flags |= _CONTENT_TYPE
        before = _short_string(content_type)
    if message_id is not None:
        flags |= _MESSAGE_ID
        after = _short_string(message_id)
    entries: list[bytes] = []
    for name, value in headers.items():
        if isinstance(value, str):
            text = value.encode()
            entries += (_header_name(name), _TEXT.pack(b"S", len(text)), text)
        else:
            entries += (_header_name(name), _NUMBER.pack(b"l", value))
    table = b"".join(entries)
    return b"".join((_START.pack(flags), before, _LENGTH.pack(len(table)), table, _PERSISTENT, after))


def text_headers(raw: bytes, names: Collection[str]) -> dict[str, str]:
    """Return those of the headers `names` that are there as text.

    raw: encoded properties as they came. Headers of another type, text that is not UTF-8 and
    anything behind a field that cannot be read are left out; never raises.
    """
    found: dict[str, str] = {}
    wanted = {name.encode() for name in names}
    try:
        for key, tag, value in header_entries(raw):
            if key in wanted and tag == b"S":
                with suppress(UnicodeDecodeError):  # the next one may be text
                    found[key.decode()] = value.decode()
    except (struct.error, IndexError, ValueError):
        pass
    return found


def header_entries(raw: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield (name, type tag, value bytes without length) of each top-level header.

    raw: encoded properties as they came. Raises struct.error, IndexError or ValueError behind the last one
    that can be read.
    """
    (flags,) = struct.unpack_from(">H", raw)
    offset = 2
    while flags & 1:  # further words of flags: none are defined, but the format allows them
        (more,) = struct.unpack_from(">H", raw, offset)
        offset += 2
        if not more & 1:
            break
    for flag in (_CONTENT_TYPE, _CONTENT_ENCODING):
        if flags & flag:
            offset += 1 + raw[offset]
    if not flags & _HEADERS:
        return
    (size,) = struct.unpack_from(">I", raw, offset)
    offset += 4
    end = min(offset + size, len(raw))
    while offset < end:
        key = raw[offset + 1 : offset + 1 + raw[offset]]
        offset += 1 + len(key)
        tag = raw[offset : offset + 1]
        offset += 1
        if tag in _LENGTH_PREFIXED:
            (width,) = struct.unpack_from(">I", raw, offset)
            offset += 4
        elif tag in _FIXED_WIDTHS:
            width = _FIXED_WIDTHS[tag]
        else:
            raise ValueError(f"unknown field type {tag!r}")
        if offset + width > end:
            raise ValueError("a field is longer than its table")
        yield key, tag, raw[offset : offset + width]
        offset += width


@lru_cache(maxsize=64)  # the names are ours, a dozen of them
def _header_name(name: str) -> bytes:
    return _short_string(name)


def _short_string(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > 255:
        raise ValueError(f"over 255 bytes: {text[:40]}...")
    return bytes((len(encoded),)) + encoded
