"""Runs the service in this process, broken in one way on purpose: `python -m chaos.launcher FUNCTION`.

Only the chaos test's teeth use it; the product has no switch for any of this.
"""

import sys

from chaos import breaks
from retry_scheduler.cli import main as run_command


def main() -> int:
    """Make the mistake of `breaks` that the command line names, and serve."""
    getattr(breaks, sys.argv[1])()
    return run_command(["run"])


if __name__ == "__main__":
    sys.exit(main())
