"""Any properties that AMQP 0-9-1 allows, by chance, encoded without the service's own code.

`dice` is random.Random, or what hypothesis gives for one. RabbitMQ's field types:
https://www.rabbitmq.com/amqp-0-9-1-errata#section_3
"""

import struct
from random import Random
from typing import NamedTuple

from tests.raw_amqp import HEADERS_FLAG, header, long_string

# Flag and kind of each property of class basic, in the order of the fields.
PROPERTIES = (
    (1 << 15, "short"),  # content type
    (1 << 14, "short"),  # content encoding
    (HEADERS_FLAG, "table"),
    (1 << 12, "octet"),  # delivery mode
    (1 << 11, "octet"),  # priority
    (1 << 10, "short"),  # correlation id
    (1 << 9, "short"),  # reply to
    (1 << 8, "short"),  # expiration
    (1 << 7, "short"),  # message id
    (1 << 6, "timestamp"),
    (1 << 5, "short"),  # type
    (1 << 4, "short"),  # user id
    (1 << 3, "short"),  # app id
    (1 << 2, "short"),  # cluster id
)

WIDTHS = {"t": 1, "b": 1, "B": 1, "s": 2, "u": 2, "I": 4, "i": 4, "l": 8, "T": 8, "D": 5, "V": 0}
MOST_NESTED = 4


class Entry(NamedTuple):
    """One header. value: the bytes behind its type tag, and behind their length where they have one."""

    name: bytes
    tag: str
    value: bytes

    @property
    def encoded(self) -> bytes:
        """The header as it stands in a table."""
        long = self.tag in "SxAF"
        return header(self.name, self.tag.encode(), long_string(self.value) if long else self.value)


def some_table(dice: Random, names: tuple[bytes, ...] = (), *, depth: int = 0) -> list[Entry]:
    """Return a table's entries: any names, some of `names` among them, perhaps more than once."""
    return [
        Entry(dice.choice(names) if names and dice.random() < 0.4 else _bytes(dice, 20), *_field(dice, depth))
        for _ in range(dice.randrange(7))
    ]


def some_properties(dice: Random, table: list[Entry] | None, *, flags: int = 0xFFFF) -> bytes:
    """Return properties that hold `table`, and by chance others. flags: the properties that may be there."""
    chosen, values = 0, []
    for flag, kind in PROPERTIES:
        if kind == "table":
            if table is None:
                continue
            value = long_string(b"".join(entry.encoded for entry in table))
        elif flag & flags and dice.random() < 0.3:
            value = _property(dice, kind)
        else:
            continue
        chosen |= flag
        values.append(value)
    return struct.pack(">H", chosen) + b"".join(values)


def _property(dice: Random, kind: str) -> bytes:
    if kind == "short":
        text = _bytes(dice, 255)
        return bytes((len(text),)) + text
    return _bits(dice, 1 if kind == "octet" else 8)


def _field(dice: Random, depth: int) -> tuple[str, bytes]:
    tags = "".join(WIDTHS) + "fdSSSSxx" + ("AF" if depth < MOST_NESTED else "")
    tag = dice.choice(tags)
    if tag in WIDTHS:
        return tag, _bits(dice, WIDTHS[tag])
    if tag in "fd":  # RabbitMQ turns away those that are not numbers
        return tag, struct.pack(f">{tag}", dice.choice([0.0, -0.1, 1e30, -1e-30, 65536.5]))
    if tag == "F":
        return tag, b"".join(entry.encoded for entry in some_table(dice, depth=depth + 1))
    if tag == "A":
        # A field of an array is an entry without its name.
        return tag, b"".join(
            Entry(b"", *_field(dice, depth + 1)).encoded[1:] for _ in range(dice.randrange(4))
        )
    return tag, _text(dice) if dice.random() < 0.7 else _bytes(dice, 40)


def _text(dice: Random) -> bytes:
    return "".join(dice.choice('aé日🐇\0"\\\n =') for _ in range(dice.randrange(12))).encode()


def _bytes(dice: Random, most: int) -> bytes:
    return _bits(dice, dice.randrange(most + 1))


def _bits(dice: Random, size: int) -> bytes:
    return dice.getrandbits(8 * size).to_bytes(size, "big") if size else b""
