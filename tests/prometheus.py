"""A Prometheus of a test's own: scrapes the service every second and answers queries like an operator's."""

import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.demo.processes import ServerMissing, ServerProcess
from tests.servers import skip_or_fail

JOB = "retry-scheduler"

# Normally a second.
START_TAKES = timedelta(seconds=30)
STOP_TAKES = timedelta(seconds=10)


class BadQuery(Exception):
    """Prometheus does not understand a query, or cannot answer it."""


def program(name: str) -> Path:
    """Return the path of prometheus or promtool; without it, skip or fail the test."""
    found = shutil.which(name)
    if found is None:
        skip_or_fail(ServerMissing(f"{name} is missing: scripts/setup prometheus"))
        raise AssertionError  # not reached
    return Path(found)


class PrivatePrometheus:
    """One Prometheus with its data in `folder`, which must not exist yet. Runs inside a `with` block.

    rules: the rule file, read from where it lies. targets: what to scrape, host:port, under our job's name.
    """

    def __init__(self, folder: Path, *, rules: Path, targets: list[str]) -> None:
        folder.mkdir()
        (port,) = free_ports(1)
        self._url = f"http://{LOOPBACK}:{port}"
        configuration = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": targets}]}],
        }
        written = folder / "prometheus.yml"
        written.write_text(json.dumps(configuration))  # JSON is YAML
        self._process = ServerProcess(
            command=[
                program("prometheus"),
                f"--config.file={written}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={LOOPBACK}:{port}",
                "--log.level=warn",
            ],
            folder=folder,
            output=folder / "output",
            environment={"PATH": os.environ["PATH"]},
        )

    def __enter__(self) -> Self:
        """Start, and return when it answers."""
        self._process.start()
        try:
            self._process.wait_until_serving(self._answers, within=START_TAKES)
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self._process.stop(within=STOP_TAKES)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an instant query, each with "metric" and "value". Raises BadQuery."""
        result: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return result

    def rules(self) -> list[dict[str, Any]]:
        """Return every rule, among others with "name", "query", "labels", "annotations" and "health"."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=1):
                return True
        except urllib.error.HTTPError as not_yet:
            not_yet.close()
        except OSError:
            pass
        return False

    def _get(self, what: str, **parameters: str) -> dict[str, Any]:
        address = f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                data: dict[str, Any] = json.load(answer)["data"]
        except urllib.error.HTTPError as refusal:
            with refusal:
                raise BadQuery(json.load(refusal)["error"]) from refusal
        return data
