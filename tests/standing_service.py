"""The service with a loop that stands still from its first work on: python -m tests.standing_service LOOP.

It is less patient than the real one, so that a test need not wait for 20 s.
"""

import asyncio
import sys
import time

from retry_scheduler import supervision

STANDS_AFTER_S = 3.0

FOR_EVER_S = 3600


async def wait_for_ever(*_: object, **__: object) -> bool:
    await asyncio.Event().wait()
    return False


async def block(*_: object, **__: object) -> bool:
    time.sleep(FOR_EVER_S)  # noqa: ASYNC251, TID251  this is what nobody should do
    return False


def main() -> None:
    supervision.STANDS_AFTER_S = STANDS_AFTER_S
    supervision.STEP_AT_LEAST_EVERY_S = STANDS_AFTER_S / 4
    # Only now: these take their copies of the numbers.
    from retry_scheduler.cli import main as run_command  # noqa: PLC0415
    from retry_scheduler.consumer import Consumer  # noqa: PLC0415
    from retry_scheduler.scheduler import Scheduler  # noqa: PLC0415

    match sys.argv[1]:
        case "intake":
            Consumer.run_once = wait_for_ever  # type: ignore[assignment,method-assign]
        case "claim":
            Scheduler.run_once = wait_for_ever  # type: ignore[method-assign]
        case "beat":
            Scheduler.beat_once = wait_for_ever  # type: ignore[assignment,method-assign]
        case "event loop":
            Scheduler.run_once = block  # type: ignore[method-assign]
    sys.exit(run_command(["run"]))


if __name__ == "__main__":
    main()
