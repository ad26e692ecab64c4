"""Runs the service in this process, mortal and perhaps broken: `python -m chaos.launcher [FUNCTION]`.

It dies at a failpoint for which there is a file of that name in the folder FAILPOINTS. The product has no
switch for any of this.
"""

import os
import signal
import sys
from pathlib import Path

from chaos import breaks
from chaos.instance import FAILPOINTS
from retry_scheduler import failpoints
from retry_scheduler.cli import main as run_command
from retry_scheduler.failpoints import Point


def main() -> int:
    """Make the mistake of `breaks` that the command line names, if any, and serve."""
    for function in sys.argv[1:]:
        getattr(breaks, function)()
    armed = Path(os.environ[FAILPOINTS])

    def reached(point: Point) -> None:
        if (armed / point).exists():
            os.kill(os.getpid(), signal.SIGKILL)

    failpoints.listen(reached)
    return run_command(["run"])


if __name__ == "__main__":
    sys.exit(main())
