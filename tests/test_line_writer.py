"""The log's writer: it never makes anybody wait, and says how many lines are missing, and where."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from io import FileIO, RawIOBase
from typing import Any

import pytest

from retry_scheduler.observability.line_writer import MAX_WAITING, LineWriter

# Of 8 bytes each, so that a pipe, which holds 64 KiB, takes some thousands.
LINES = 4 * MAX_WAITING
TOGETHER = 1000


class SmallDisk(RawIOBase):
    """Takes `room` bytes, and then no more until it is given more room."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.content = b""

    def write(self, data: Any, /) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = bytes(data)[: self.room]
        self.room -= len(taken)
        self.content += taken
        return len(taken)


def missing(lines: int) -> bytes:
    return b"missing %d" % lines


@pytest.fixture
def pipe() -> Iterator[tuple[FileIO, FileIO]]:
    reading, writing = os.pipe()
    with closing(FileIO(reading)) as reader, closing(FileIO(writing, "w")) as writer:
        yield reader, writer


@pytest.mark.parametrize("blocking", [True, False])
def test_what_a_reader_has_missed_is_counted_and_told_where_it_is_missing(
    pipe: tuple[FileIO, FileIO], blocking: bool
) -> None:
    reader, stream = pipe
    os.set_blocking(stream.fileno(), blocking)
    writer = LineWriter(stream, missing)

    for first in range(0, LINES, TOGETHER):
        writer.write(*(b"%07d" % number for number in range(first, first + TOGETHER)))
    dropped = writer.dropped
    expected = told = 0
    with os.fdopen(os.dup(reader.fileno()), "rb") as text:
        while expected < LINES:
            line = text.readline().removesuffix(b"\n")
            if line.startswith(b"missing "):
                told += int(line.split()[1])
                expected += int(line.split()[1])
            else:
                assert line == b"%07d" % expected
                expected += 1

    assert expected == LINES
    assert told == dropped == writer.dropped
    assert dropped >= LINES - 2 * MAX_WAITING - 64 * 1024 // 8


def test_what_could_not_be_written_is_told_in_a_line_of_its_own_as_soon_as_it_can_be() -> None:
    disk = SmallDisk(room=20)
    writer = LineWriter(disk, missing)

    writer.write(*(b"line %d" % number for number in range(10)))
    writer.flush()
    assert (disk.content, writer.dropped) == (b"line 0\nline 1\nline 2", 8)

    disk.room = 3  # not even enough to tell
    writer.write(b"line 10")
    writer.flush()
    assert (disk.content, writer.dropped) == (b"line 0\nline 1\nline 2\nmi", 9)

    disk.room = 1000
    writer.write(b"line 11")
    writer.write(b"line 12")
    writer.flush()
    assert disk.content.split(b"\n")[3:] == [b"mi", b"missing 9", b"line 11", b"line 12", b""]
    assert writer.dropped == 9
