"""One instance of the service: started, killed, frozen and stopped, each time noted in the operation log.

Every start has a log file of its own: what a killed process has written last may be half a line.
"""

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from chaos.oplog import OperationLog
from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.demo.processes import PrivateServerError, ServerProcess, wait_until

CHECKOUT = Path(__file__).resolve().parent.parent

START_TAKES = timedelta(seconds=60)
# The promise is 20 s; more would be seen by I9, and not here.
STOP_TAKES = timedelta(seconds=25)
# Longer would be no kill in the midst of the work.
COMES_TO_A_POINT = timedelta(seconds=2)
PAGE_TIMEOUT_S = 5.0

# Names the folder in which `die_at` leaves its wish for the launcher.
FAILPOINTS = "FAILPOINTS"
COMMAND = ("-m", "chaos.launcher")

_PASSED_ON = ("PATH", "HOME", "LANG", "PYTHONPATH")


class Instance:
    """An instance keeps its name, its ports and its settings over its restarts."""

    def __init__(
        self,
        name: str,
        *,
        folder: Path,
        settings: Mapping[str, str],
        log: OperationLog,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """folder: for its logs. command: what Python is given to run; ends with or like COMMAND."""
        self.name = name
        self._http_port, self._metrics_port = free_ports(2)
        kept = {name: value for name, value in os.environ.items() if name in _PASSED_ON}
        ports = {"HTTP_PORT": str(self._http_port), "METRICS_PORT": str(self._metrics_port)}
        self._failpoints = folder / f"{name}.failpoints"
        self._failpoints.mkdir()
        armed = {FAILPOINTS: str(self._failpoints)}
        self._environment = {**kept, "HTTP_HOST": LOOPBACK, **ports, **armed, **settings}
        self._folder = folder
        self._log = log
        self._command = command
        self._process: ServerProcess | None = None
        self._starts = 0
        self.frozen = False

    @property
    def pid(self) -> int:
        """The process id of the last start."""
        return self._running().pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended. A frozen one is running."""
        return self._process is not None and self._process.is_alive

    def start(self) -> None:
        """Start a process and return at once."""
        self._starts += 1
        output = self._folder / f"{self.name}.{self._starts}.log"
        self._process = ServerProcess(
            command=[sys.executable, *self._command],
            folder=CHECKOUT,
            output=output,
            environment=self._environment,
        )
        self._process.start()
        self._note("start", log=output.name)

    def wait_until_ready(self) -> None:
        """Return when /ready says so. Raises PrivateServerError."""
        self._running().wait_until_serving(self.is_ready, within=START_TAKES)

    def is_ready(self) -> bool:
        """Whether it says that it works."""
        return self.page("/ready") is not None

    def page(self, path: str) -> str | None:
        """Return a page, also one that says 503 unless it is /ready; None if there is no answer."""
        port = self._metrics_port if path == "/metrics" else self._http_port
        try:
            with urllib.request.urlopen(f"http://{LOOPBACK}:{port}{path}", timeout=PAGE_TIMEOUT_S) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as refusal:
            with refusal:
                return None if path == "/ready" else refusal.read().decode()
        except OSError:
            return None

    def visible(self) -> str:
        """Return what anybody on the machine can see of it: its pages and its command line."""
        pages = (self.page(path) or "" for path in ("/health", "/ready", "/metrics"))
        return "".join(pages) + Path(f"/proc/{self.pid}/cmdline").read_text()

    def kill(self) -> None:
        """SIGKILL. Harmless if it has ended."""
        if self.is_running:
            self._note("kill")
            self._running().kill()
            self.frozen = False

    def die_at(self, point: str) -> None:
        """Let it be killed when its work comes to a failpoint, or a little later if it does not."""
        wish = self._failpoints / point
        wish.touch()
        with suppress(PrivateServerError):
            wait_until(lambda: not self.is_running, within=COMES_TO_A_POINT, what=f"{self.name} to die")
        wish.unlink()
        self._note("kill")
        self._running().kill()

    def freeze(self) -> None:
        """SIGSTOP."""
        self._note("freeze")
        self._running().freeze()
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT. Harmless if it is not frozen."""
        if self.frozen:
            self._note("thaw")
            self.frozen = False
            self._running().thaw()

    def terminate(self) -> None:
        """SIGTERM; returns when it has ended, and kills it if it does not."""
        if not self.is_running:
            return
        process = self._running()
        self._note("terminate")
        os.kill(process.pid, 15)
        try:
            wait_until(lambda: not process.is_alive, within=STOP_TAKES, what=f"{self.name} to stop")
            self._note("ended")
        except PrivateServerError:
            self.kill()

    def discard(self) -> None:
        """End it, whatever state it is in, at the end of a trial."""
        self.thaw()
        if self.is_running:
            self._running().stop(within=STOP_TAKES)

    def _note(self, what: str, **fields: str) -> None:
        self._log.write("instance", "ok", what=what, instance=self.name, pid=self.pid, **fields)

    def _running(self) -> ServerProcess:
        if self._process is None:
            raise PrivateServerError(f"{self.name} was never started")
        return self._process
