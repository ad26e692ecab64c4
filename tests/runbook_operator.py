"""Follows chapter 8 of the runbook as an operator would: its commands and statements as they stand.

Files lie in a folder that takes the place of /, psql and its kind meet a private server, and what belongs
to systemd is done to the processes themselves: starting, stopping, signals, the journal.
"""

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from retry_scheduler.demo.postgres_programs import find_programs
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.command import call
from tests.service_process import PROJECT, START_TAKES, MakeService, ServiceProcess
from tests.waiting import eventually

RUNBOOK = (PROJECT / "docs" / "runbook.md").read_text()
UNIT = "eracun-retry-scheduler"

# A line of Bash whose first word is one of these is done here, everything else by Bash itself.
SUDO = re.compile(r"^sudo (?:-u \w+ )?")
OUR_FOLDERS = re.compile(r"(?<![\w./])/(etc|var|tmp)/")


def section(number: str) -> str:
    """Return the text of a section such as 8.1, without its title."""
    (text,) = re.findall(rf"^### {re.escape(number)} .*?\n(.*?)(?=^##|\Z)", RUNBOOK, re.DOTALL | re.MULTILINE)
    return str(text)


def steps(number: str) -> dict[str, list[tuple[str, str]]]:
    """Return the steps of a section by their titles: of each step its blocks, language and text."""
    parts = re.split(r"^\*\*(.+?)\.\*\*", section(number), flags=re.MULTILINE)[1:]
    found = {
        title: re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }
    return {title: blocks for title, blocks in found.items() if blocks}


class Operator:
    """One operator, and the machines of the service: as many instances as there are machines."""

    def __init__(
        self,
        folder: Path,
        make_service: MakeService,
        postgres: PrivatePostgres,
        database: str,
        **settings: str,
    ) -> None:
        """folder: where the services' logs are as well. settings: of every instance."""
        self.services: list[ServiceProcess] = []
        self.postgres = postgres
        self.rabbitmq: PrivateRabbitMQ | None = None
        self._make_service = make_service
        self._settings = settings
        self._database = database
        self._followed: list[tuple[str, str]] = []
        self._logs = folder
        self._root = folder / "root"
        self._environment_file = self._root / "etc" / "eracun" / "retry-scheduler.env"
        self._programs = folder / "programs"
        for path in (
            self._environment_file.parent,
            self._root / "var" / "backups",
            self._root / "tmp",
            self._programs,
        ):
            path.mkdir(parents=True)
        (self._root / "var" / "backups" / "retry-scheduler").mkdir()
        self._environment_file.touch()
        self._add_program("sudo", 'if [ "$1" = -u ]; then shift 2; fi\nexec "$@"')
        self._add_program("journalctl", f"cat {folder}/service-*.log")

    async def start(self, machines: int = 1) -> None:
        """Start the service on every machine, and return when each is ready."""
        await self._start(machines)
        for service in self.services:
            await service.wait_until_ready()

    async def follow(self, number: str, title: str, filled_in: Mapping[str, str] | None = None) -> str:
        """Do what a step says and return all that it printed. filled_in: values for those of the example."""
        self._followed.append((number, title))
        blocks = steps(number)[title]
        for example, value in (filled_in or {}).items():
            assert any(example in text for _, text in blocks), f"{example} is not in {title}"
            blocks = [(language, text.replace(example, value)) for language, text in blocks]
        printed = ""
        for language, text in blocks:
            on_this_machine = OUR_FOLDERS.sub(rf"{self._root}/\1/", text)
            if language == "sql":
                printed += self._psql(on_this_machine)
            else:
                for line in on_this_machine.replace("\\\n", " ").splitlines():
                    printed += await self._command(line)
        return printed

    def left_out(self, number: str) -> list[str]:
        """Return the steps of a section that have not been followed, in order."""
        return [title for title in steps(number) if (number, title) not in self._followed]

    def file(self, path: str) -> Path:
        """Return where a file of the machine lies."""
        return self._root / path.removeprefix("/")

    async def _command(self, line: str) -> str:
        words = shlex.split(SUDO.sub("", line), comments=True)
        if not words:
            return ""
        program, *arguments = words
        if program == "systemctl":
            return await self._systemctl(arguments)
        if program == "curl":
            page = arguments[-1].rpartition("/")[2]
            return str({"health": self._first.health, "ready": self._first.ready}[page]().body) + "\n"
        if program == "rabbitmqctl":
            assert self.rabbitmq is not None
            return self.rabbitmq.ctl(*arguments)
        if program == "retry-scheduler":
            done = call(*arguments, **self._first.environment)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            return done.stdout
        return self._run(["bash", "-euo", "pipefail", "-c", line])

    async def _systemctl(self, arguments: list[str]) -> str:
        verb, *options, unit = arguments
        assert unit == UNIT
        if verb in ("stop", "restart"):
            for service in self.services:
                if service.is_running:
                    assert await service.stop() == 0
        if verb in ("start", "restart"):
            await self._start(len(self.services))
        if verb == "kill":
            assert options == ["--signal=SIGUSR1", "--kill-whom=main"]
            for service in self.services:
                os.kill(service.pid, signal.SIGUSR1)
        return f"{[service.exit_code for service in self.services]}\n" if verb == "status" else ""

    async def _start(self, machines: int) -> None:
        lines = self._environment_file.read_text().splitlines()
        settings = self._settings | dict(line.split("=", 1) for line in lines)
        self.services = [self._make_service(**settings) for _ in range(machines)]
        for service in self.services:
            service.start()
        for service in self.services:  # systemd waits for that as well
            await eventually(_answers(service), within=START_TAKES)

    def _psql(self, text: str) -> str:
        return self._run(
            ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", self._database], text
        )

    def _run(self, command: list[str], text: str = "") -> str:
        environment = {
            "PATH": f"{self._programs}:{find_programs()}:{os.environ['PATH']}",
            "PGHOST": self.postgres.host,
            "PGPORT": str(self.postgres.port),
            "PGUSER": self.postgres.superuser,
        }
        done = subprocess.run(
            command,
            env=environment,
            cwd=self._root,
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @property
    def _first(self) -> ServiceProcess:
        return self.services[0]

    def _add_program(self, name: str, script: str) -> None:
        program = self._programs / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)


def _answers(service: ServiceProcess) -> Callable[[], bool]:
    return lambda: service.ready().status in (200, 503)
