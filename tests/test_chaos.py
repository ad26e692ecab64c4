"""The chaos test's short form: the hardest faults in half a minute, as `make chaos` does it for longer."""

import os
import subprocess
import sys

import pytest

from chaos.__main__ import SERVER_MISSING
from retry_scheduler.demo.processes import ServerMissing
from tests.servers import skip_or_fail
from tests.service_process import PROJECT

INVARIANTS = 11


@pytest.mark.timeout(150)
def test_the_hardest_faults_in_a_row_violate_no_invariant() -> None:
    command = [sys.executable, "-m", "chaos", "--short", "--seed", "1"]
    ran = subprocess.run(command, cwd=PROJECT, env=os.environ, capture_output=True, text=True, check=False)

    if ran.returncode == SERVER_MISSING:
        skip_or_fail(ServerMissing(ran.stderr))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    holding = [line for line in ran.stdout.splitlines() if line.startswith("I") and " holds " in line]
    assert len(holding) == INVARIANTS, ran.stdout
