"""Writes the log's lines without ever making the service wait, and counts those that are lost.

Lines are written together, once for each turn of the event loop, by a thread of their own: a
reader that stops reading must not stop retries. If it stays away, the oldest waiting lines are
dropped, and one line tells how many they were once it is back.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from io import RawIOBase

# At most this many lines wait for a reader that has stopped reading: about 20 MB.
MAX_WAITING = 50_000

# Between two tries to write to a stream that does not make us wait by itself.
_FULL_PAUSE_S = 0.05


class LineWriter:
    """Writes lines to an unbuffered stream from a thread of its own; `write` never waits.

    dropped: how many lines are lost so far, not read in time or impossible to write.
    """

    def __init__(self, stream: RawIOBase, notice: Callable[[int], bytes]) -> None:
        """notice: makes the line that stands where so many are missing."""
        self._stream = stream
        self._notice = notice
        self._waiting: deque[bytes] = deque()
        # One thread may take it twice: the garbage collector logs in the middle of anything.
        self._lock = threading.RLock()
        self.dropped = 0
        self._told = 0
        self._cut = False
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._work, name="log writer", daemon=True)
        self._thread.start()

    def write(self, *lines: bytes) -> None:
        """Hand over lines, without their ends."""
        with self._lock:
            self._waiting.extend(lines)
            while len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self.dropped += 1
        if lines and not self._wake.is_set():
            self._idle.clear()
            self._wake.set()

    def flush(self, timeout_s: float = 1.0) -> None:
        """Wait until everything is written, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._idle.wait(0.01) and not self._waiting:
                return

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            with self._lock:
                lines, self._waiting = self._waiting, deque()
                missing = self.dropped - self._told
            if lines:
                self._write_all(lines, missing)
            if not self._waiting and not self._wake.is_set():
                self._idle.set()

    def _write_all(self, lines: Sequence[bytes], missing: int) -> None:
        notice = (self._notice(missing),) if missing else ()
        # The rest of a line that was cut is lost; what follows must not be appended to its beginning.
        text = b"\n" * self._cut + b"\n".join((*notice, *lines, b""))
        rest = memoryview(text)
        try:
            while rest:
                written = self._stream.write(rest)
                if not written:
                    time.sleep(_FULL_PAUSE_S)
                rest = rest[written or 0 :]
        except (OSError, ValueError):  # the reader has gone; retries go on without a log
            pass
        unwritten = rest.tobytes().count(b"\n")
        if len(rest) < len(text):
            self._cut = text[len(text) - len(rest) - 1] != ord("\n")
        with self._lock:
            self.dropped += min(unwritten, len(lines))
            if unwritten <= len(lines):
                self._told += missing
