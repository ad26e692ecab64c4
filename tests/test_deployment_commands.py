"""The commands of docs/deployment.md, run as they stand: build, install, update, roll back.

Another folder takes the place of /, the locked libraries come from this environment instead of a package
index, and what belongs to systemd is only noted. Everything else is the real thing, the wheel included.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.servers import Database
from tests.service_process import PROJECT
from tests.table import Table

pytest_plugins = ("tests.fixtures",)

GUIDE = (PROJECT / "docs" / "deployment.md").read_text()
VERSION, NEXT_VERSION = "1.0.0", "1.0.1"

FROM_INDEX = "sudo $services/$version/bin/pip install --require-hashes --requirement runtime.lock"
WHEEL = (
    "sudo $services/$version/bin/pip install --no-deps --no-index retry_scheduler-$version-py3-none-any.whl"
)
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"


def blocks(chapter: str) -> list[str]:
    """The commands of one chapter, in order."""
    (text,) = re.findall(rf"^## {chapter}\n(.*?)(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


class Machine:
    """A folder in the place of /, and programs in the place of those that need more than a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "folder"  # what was copied to the machine
        self._programs = root / "programs"
        self._programs.mkdir()
        self._noted = root / "noted"
        (root / "etc" / "systemd" / "system").mkdir(parents=True)
        self._add_program("sudo", 'exec "$@"')
        self._add_program("nano", f'cat {root}/edited >>"$1"')
        for name in ("systemctl", "curl"):
            self._add_program(name, f'echo "{name} $*" >>{self._noted}')

    def run(self, commands: str, *, cwd: Path) -> str:
        """Run commands as an operator would paste them, and return what they print."""
        if FROM_INDEX in commands:
            assert (cwd / "runtime.lock").exists()
            assert WHEEL in commands
            libraries = sysconfig.get_path("purelib")
            known = f"$services/$version/lib/{PYTHON}/site-packages/locked.pth"
            # Not before the wheel is in: pip would take the checkout's own installation for it.
            commands = commands.replace(FROM_INDEX, "").replace(WHEEL, f"{WHEEL}\necho {libraries} >{known}")
        commands = self.inside(commands)
        environment = {
            "PATH": f"{self._programs}:{self.root}/usr/local/bin:{os.environ['PATH']}",
            "HOME": str(self.root),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def inside(self, text: str) -> str:
        """Return text with this machine's folders in place of those below /."""
        return re.sub(r"(?<![\w./])/(opt|etc|usr/local)/", rf"{self.root}/\1/", text)

    @property
    def noted(self) -> list[str]:
        """What systemctl and curl were asked to do."""
        return self._noted.read_text().splitlines()

    @property
    def running_version(self) -> str:
        """What the unit would start now."""
        program = self.root / "opt/eracun/services/retry-scheduler/current/bin/retry-scheduler"
        # From another folder, so that not the checkout answers.
        done = subprocess.run([program, "--version"], cwd="/", capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def _add_program(self, name: str, script: str) -> None:
        program = self._programs / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)


def build_next_version(folder: Path, into: Path) -> None:
    """Build the wheel of a release to come: this one with another number."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, folder / name)
    shutil.copytree(PROJECT / "retry_scheduler", folder / "retry_scheduler")
    for path in (folder / "pyproject.toml", folder / "retry_scheduler" / "__init__.py"):
        text = path.read_text()
        assert f'"{VERSION}"' in text
        path.write_text(text.replace(f'"{VERSION}"', f'"{NEXT_VERSION}"'))
    wheel = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(into))
    subprocess.run([sys.executable, "-m", "pip", *wheel, str(folder)], check=True, timeout=60)


@pytest.mark.timeout(240)
async def test_the_commands_of_the_guide_build_install_update_and_roll_back(
    tmp_path: Path, database: Database, broker_url: str, table: Table
) -> None:
    machine = Machine(tmp_path)
    typed = {"postgres_password": database.password, "rabbitmq_url": broker_url}
    for name, secret in typed.items():
        (tmp_path / name).write_text(secret + "\n")
    (tmp_path / "edited").write_text(
        f"POSTGRES_HOST={database.host}\nPOSTGRES_PORT={database.port}\n"
        f"POSTGRES_DB={database.name}\nPOSTGRES_USER={database.user}\n"
    )
    owner_password = tmp_path / "etc" / "eracun" / "credentials" / "owner_password"
    owner_password.parent.mkdir(parents=True)
    owner_password.write_text(database.password)
    owner = "POSTGRES_HOST=localhost POSTGRES_DB=eracun POSTGRES_USER=eracun_owner"
    this_database = (tmp_path / "edited").read_text().replace("\n", " ").strip()

    (build,) = blocks("Build")
    machine.run(build, cwd=PROJECT)
    shutil.copytree(PROJECT / "dist", machine.folder)
    for_operators = machine.folder / "retry-scheduler"
    for_operators.write_text(machine.inside(for_operators.read_text()))
    printed = ""
    for commands in blocks("Install"):
        here = re.sub(r"/dev/stdin (\S+/)(\w+)$", rf"{tmp_path}/\2 \1\2", commands, flags=re.MULTILINE)
        printed += machine.run(here.replace(owner, this_database), cwd=machine.folder)

    assert machine.running_version == VERSION
    assert "applied 0001_retry_queue" in printed  # the wheel has the SQL
    assert await table.value("SELECT count(*) FROM retry_queue") == 0
    assert "WRONG" not in printed
    assert len(re.findall(r"^ok ", printed, re.MULTILINE)) == 3
    etc = tmp_path / "etc"
    secrets = list((etc / "eracun" / "credentials" / "retry-scheduler").iterdir())
    assert {path.name: path.read_text().strip() for path in secrets} == typed
    assert {path.stat().st_mode & 0o077 for path in (*secrets, secrets[0].parent)} == {0}
    unit = (PROJECT / "deployment" / "eracun-retry-scheduler.service").read_text()
    assert (etc / "systemd" / "system" / "eracun-retry-scheduler.service").read_text() == unit
    assert machine.noted[:2] == ["systemctl daemon-reload", "systemctl enable --now eracun-retry-scheduler"]

    (tmp_path / "next").mkdir()
    build_next_version(tmp_path / "next", machine.folder)
    machine.run("\n".join(blocks("Update")), cwd=machine.folder)  # in one shell: it keeps the variables
    assert machine.running_version == NEXT_VERSION
    assert machine.noted.count("systemctl daemon-reload") == 2
    for commands in blocks("Roll back"):
        machine.run(commands, cwd=machine.folder)
    assert machine.running_version == VERSION
    assert machine.noted.count("systemctl restart eracun-retry-scheduler") == 2
    rotate = blocks("Rotate a secret")[0].replace("/dev/stdin", str(tmp_path / "rotated"))
    (tmp_path / "rotated").write_text("another one")
    machine.run(rotate, cwd=tmp_path)
    assert (secrets[0].parent / "postgres_password").read_text() == "another one"
    assert machine.noted[-1] == "systemctl restart eracun-retry-scheduler"


def test_the_lock_has_everything_that_the_wheel_asks_for() -> None:
    lock = (PROJECT / "requirements" / "runtime.lock").read_text()
    (dependencies,) = re.findall(
        r"^dependencies = \[\n(.*?)^\]", (PROJECT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    needed = re.findall(r'^  "([\w-]+)', dependencies, re.MULTILINE)
    locked = re.findall(r"^([\w-]+)==\S+ \\\n    --hash=sha256:", lock, re.MULTILINE)

    assert len(needed) > 5
    assert set(needed) <= set(locked)
