"""The program itself, as operators run it: a process with its own ports, settings and log.

A test sees what an operator sees: pages, metrics, log lines, exit codes, and nothing inside.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from prometheus_client.parser import text_string_to_metric_families

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from tests.failing_service import FOLDER_VARIABLE, INJECTED
from tests.vocabulary import SENTENCES
from tests.waiting import eventually

PROJECT = Path(__file__).parents[1]

# Normally under a second. Two cores that also carry two servers and another instance need more.
START_TAKES = timedelta(seconds=20)
# The promise is 20 s. The process gets more, so that a test can see by how much it failed.
STOP_TAKES = timedelta(seconds=25)

LOG_TAIL_LINES = 40


@dataclass(frozen=True)
class Page:
    """One answer of /health or /ready. took_s: seconds until it was complete."""

    status: int
    body: dict[str, Any]
    took_s: float


class Figures:
    """One reading of /metrics."""

    def __init__(self, text: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    @property
    def names(self) -> set[str]:
        """Every sample's name."""
        return {sample.name for sample in self._samples}

    def labels(self, name: str, label: str) -> set[str]:
        """Every value that `label` has on the series of `name`."""
        return {
            sample.labels[label] for sample in self._samples if sample.name == name and label in sample.labels
        }

    def value(self, name: str, **labels: str) -> float:
        """The sum of the series of `name` that carry `labels`; 0 without any."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


class ServiceProcess:
    """One instance. It may be started again after it has ended; the log goes on in the same file."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """folder: for its log. environment: settings; the process sees hardly anything of ours.

        With a folder of failpoints among them, see `failing_service`, it can be made to fail.
        """
        self.http_port, self.metrics_port = free_ports(2)
        self._environment = {
            "PATH": os.environ["PATH"],
            "HTTP_HOST": LOOPBACK,
            "HTTP_PORT": str(self.http_port),
            "METRICS_PORT": str(self.metrics_port),
            **environment,
        }
        self._log = folder / f"service-{self.http_port}.log"
        self._errors = folder / f"service-{self.http_port}.err"
        self._program = "tests.failing_service" if FOLDER_VARIABLE in environment else "retry_scheduler"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        """Start the process and return at once. arguments: of `run`."""
        assert not self.is_running, "it is running already"
        with self._log.open("ab") as log, self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._program, "run", *arguments],
                cwd=PROJECT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=errors,
            )

    @property
    def environment(self) -> dict[str, str]:
        """What the program was started with: also for its other commands."""
        return dict(self._environment)

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the last start."""
        assert self._process is not None, "it was never started"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """What the process left with; None while it runs."""
        return self._process.poll() if self._process is not None else None

    async def wait_until_ready(self, within: timedelta = START_TAKES) -> None:
        """Return once /ready says so."""
        await eventually(lambda: self._ended() or self.ready().status == 200, within=within)
        assert self.is_running, f"it left with {self.exit_code}: {self.error_output()}"

    async def wait_until_ended(self, within: timedelta = STOP_TAKES) -> int:
        """Return the exit code once the process has ended by itself."""
        await eventually(self._ended, within=within)
        assert self.exit_code is not None
        return self.exit_code

    def terminate(self) -> None:
        """Send SIGTERM and return at once."""
        os.kill(self.pid, signal.SIGTERM)

    async def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.terminate()
        return await self.wait_until_ended()

    def kill(self) -> None:
        """Send SIGKILL and return when the process is gone. Harmless if it has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)

    def freeze(self) -> None:
        """Stop the process where it is."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process go on."""
        os.kill(self.pid, signal.SIGCONT)

    @property
    def is_frozen(self) -> bool:
        """Whether the process stands still since it was stopped."""
        return (
            self.is_running
            and Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        )

    def health(self) -> Page:
        """GET /health."""
        return self._page("/health")

    def ready(self) -> Page:
        """GET /ready."""
        return self._page("/ready")

    def metrics(self) -> Figures:
        """GET /metrics."""
        with urllib.request.urlopen(f"http://{LOOPBACK}:{self.metrics_port}/metrics", timeout=10) as answer:
            return Figures(answer.read().decode())

    def log_events(self, message: str | None = None) -> list[dict[str, Any]]:
        """The log so far, one dictionary a line; only the events called `message`, if given."""
        events = [json.loads(line) for line in self.log_lines()]
        return [event for event in events if message is None or event["message"] == message]

    def log_lines(self) -> list[bytes]:
        """The complete lines of the log so far. SIGKILL may cut the last one in two; that one is left out."""
        content = self._log.read_bytes() if self._log.exists() else b""
        return content.split(b"\n")[:-1]

    def log_text(self) -> str:
        """The whole log so far."""
        return self._log.read_text() if self._log.exists() else ""

    def log_tail(self) -> str:
        """The last lines of the log, for a report."""
        return "\n".join(self.log_text().splitlines()[-LOG_TAIL_LINES:])

    def error_output(self) -> str:
        """What it wrote to standard error."""
        return self._errors.read_text() if self._errors.exists() else ""

    def limit_file_size(self) -> None:
        """Let every further write to its log fail, as on a full disk."""
        _, most = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (0, most))

    def lift_file_size_limit(self) -> None:
        """Let its log grow again."""
        _, most = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (most, most))

    @property
    def rss_bytes(self) -> int:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def peak_rss_bytes(self) -> int:
        """The most that resident memory has been."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(peak) * 1024

    def _ended(self) -> bool:
        return not self.is_running

    def _page(self, path: str) -> Page:
        began = time.monotonic()
        try:
            with urllib.request.urlopen(f"http://{LOOPBACK}:{self.http_port}{path}", timeout=10) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as refusal:
            with refusal:
                status, content = refusal.code, refusal.read()
        return Page(status, json.loads(content), time.monotonic() - began)


def complaints_about_log(service: ServiceProcess, *, secrets: Mapping[str, str]) -> Iterator[str]:
    """Yield what no log of any run may hold: lines that are no known event, secrets, crashes.

    secrets: what must not be there, by its name.
    """
    for line in service.log_lines():
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or not {"timestamp", "level", "message", "service"} <= event.keys():
            yield f"not an event: {line[:200]!r}"
        elif "exception" in event and INJECTED not in event["exception"]:
            yield f"an exception was logged: {event['message']}: {event['exception'][-2000:]}"
        elif event["message"] not in SENTENCES and "logger" not in event:  # which libraries' events have
            yield f"not a sentence of observability/events.py: {event['message']}"
    for name, secret in secrets.items():
        if secret in service.log_text():
            yield f"the log holds {name}"
    if service.error_output():
        yield f"standard error is not empty: {service.error_output()[-2000:]}"


class MakeService(Protocol):
    """Makes an instance for this test's database and virtual host; does not start it."""

    def __call__(self, **settings: str) -> ServiceProcess: ...


class StartService(Protocol):
    """Starts instances and returns when they are ready."""

    async def __call__(self, **settings: str) -> ServiceProcess: ...
