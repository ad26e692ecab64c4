"""Makes `python -m retry_scheduler` and the installed program the same thing."""

import sys

from retry_scheduler.cli import main as run_command


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run_command())


if __name__ == "__main__":
    main()
