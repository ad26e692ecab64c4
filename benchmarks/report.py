"""The report: one table for people, and results/latest.json for the documents."""

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.bed import CHECKOUT
from benchmarks.contestants import PEERS_PYTHON
from benchmarks.figures import rounded
from benchmarks.scenario import Figures, Options, Scenario
from retry_scheduler import __version__
from retry_scheduler.demo.postgres_programs import find_programs, run_program
from retry_scheduler.demo.processes import PrivateServerError

RESULTS = CHECKOUT / "benchmarks" / "results" / "latest.json"

_RABBITMQ = Path("/usr/lib/rabbitmq/lib")


def throwaway() -> Path:
    """Return where a short run keeps its figures, which nobody should quote."""
    return RESULTS.with_name("short.json")


def keep(target: Path, name: str, figures: Figures, options: Options) -> None:
    """Put one scenario's figures into the file, beside the others that were measured on this machine."""
    results: dict[str, Any] = {}
    if target.exists():
        results = json.loads(target.read_text(encoding="utf-8"))
    here = machine()
    before = results.get("machine", {})
    if before.items() >= here.items():  # only the peers are missing here, and their figures stay
        here = before
    if before != here:  # figures of two machines do not belong in one table
        results = {"machine": here, "scenarios": {}}
    results["scenarios"][name] = {"rounds_taken": options.repetitions, **figures}
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(rounded(results), indent=2) + "\n", encoding="utf-8")


def table(scenarios: Sequence[Scenario], measured: Mapping[str, Figures]) -> str:
    """Return the figures as text, a block for each scenario."""
    blocks = []
    for scenario in scenarios:
        if scenario.name in measured:
            rows = scenario.rows(measured[scenario.name])
            wide = max(len(row.who) for row in rows), max(len(row.value) for row in rows)
            lines = [f"  {row.who:<{wide[0]}}  {row.value:>{wide[1]}}  {row.beside}".rstrip() for row in rows]
            blocks.append("\n".join([scenario.title, *lines]))
    return "\n\n".join(blocks)


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "postgresql": _postgresql(),
        "rabbitmq": _rabbitmq(),
        "retry-scheduler": __version__,
        **{package: version(package) for package in ("asyncpg", "pika", "uvloop")},
        **_peers(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _postgresql() -> str:
    try:
        said = run_program([find_programs() / "postgres", "--version"], folder=CHECKOUT)
    except (PrivateServerError, OSError):
        return "unknown"
    return said.split()[-1]


def _rabbitmq() -> str:
    found = sorted(_RABBITMQ.glob("rabbitmq_server-*"))
    return found[-1].name.removeprefix("rabbitmq_server-") if found else "unknown"


def _peers() -> dict[str, str]:
    folders = PEERS_PYTHON.parent.parent.glob("lib/python*/site-packages/*.dist-info")
    named = [re.match(r"(pgqueuer|celery)-([\w.]+)\.dist-info", folder.name) for folder in folders]
    return {found[1]: found[2] for found in named if found}
