"""The operation log: one JSON object a line, only ever appended, in the words of Jepsen.

    f     what: enqueue, deliver, review, fault, instance, phase, sample
    type  invoke (begins), ok (happened), fail (certainly did not), info (nobody knows)
    t     seconds of the monotonic clock

The first line, f = "clock", ties that clock to the wall clock of the servers' and the service's logs.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class OperationLog:
    """Appends from any thread. An entry is in the file when `write` returns, and lines keep their order."""

    def __init__(self, path: Path) -> None:
        """Begin a new log. Raises FileExistsError if there is one."""
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        self._lock = threading.Lock()
        self._operations = 0
        self.write("clock", "ok", wall=time.time())

    def write(self, f: str, type_: str, **fields: Any) -> float:
        """Append one entry and return its time."""
        with self._lock:
            t = time.monotonic()
            line = json.dumps({"t": t, "f": f, "type": type_, **fields}) + "\n"
            # Not synced to the disk: it is the service that may crash here, and not this program.
            os.write(self._file, line.encode())
        return t

    def new_operation(self) -> int:
        """Return a number that ties an operation's end to its beginning."""
        with self._lock:
            self._operations += 1
            return self._operations

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_operations(path: Path) -> Iterator[Entry]:
    """Yield the entries in their order."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
