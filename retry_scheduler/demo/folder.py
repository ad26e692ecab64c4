"""A temporary folder that goes with its owner, however the owner ends."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

# Waits for the end of its standard input, which only the owner holds open. The second time is for what
# the servers wrote before they noticed the owner's end themselves.
WATCH = 'read -r _; rm -rf "$1"; sleep 2; rm -rf "$1"'


class TemporaryFolder:
    """A context manager: entering makes the folder and returns its path, leaving removes it.

    Other users can pass through it, but not list it: PostgreSQL, run by root, has a user of its own.
    """

    def __enter__(self) -> Path:
        """Make the folder."""
        self._path = Path(tempfile.mkdtemp(prefix="retry-scheduler-demo-"))
        self._path.chmod(0o711)
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", WATCH, "sh", str(self._path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        return self._path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the folder."""
        shutil.rmtree(self._path)
        self._watcher.kill()
        self._watcher.communicate()  # closes our end of the pipe, and reaps
