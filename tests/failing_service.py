"""The real program, with a listener at its failpoints that kills, freezes, delays or breaks it on demand.

`python -m tests.failing_service run` with FAILPOINTS naming a folder. A point is armed by a file with
its name, which holds the action. It works once; that the file is gone says that the point was reached.
So a test may arm points while the program runs, and a program that is started again does not die again.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from retry_scheduler import failpoints, publisher
from retry_scheduler.broker.intake_link import Delivery
from retry_scheduler.broker.publication import Publication
from retry_scheduler.cli import main
from retry_scheduler.consumer import Consumer
from retry_scheduler.failpoints import Point
from retry_scheduler.messages import ClaimedQuarantine, ClaimedRetry, RetryRequest

FOLDER_VARIABLE = "FAILPOINTS"

# Longer than the 4 s or so after which an instance that does not beat is buried.
HANGS_FOR_S = 7.0

# What the log of a program that was broken on purpose may hold.
INJECTED = "broken on purpose by a test"

POINTS: tuple[Point, ...] = get_args(Point)


class Injected(Exception):
    """A bug that nobody has foreseen."""


def kill() -> None:
    """Die at once, as of the kernel's out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    """Stand still until SIGCONT, as a paused container does."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    """Keep the event loop from everything else until another instance has taken over."""
    time.sleep(HANGS_FOR_S)  # noqa: TID251  the fault itself


def fail() -> None:
    """Meet a bug."""
    raise Injected(INJECTED)


# Error texts of messages that are the death of the process, as of a library that crashes on them.
DEADLY_TO_READ = "deadly to read"
DEADLY_TO_RETRY = "deadly to retry"
DEADLY_TO_CARRY = "deadly to retry, and to tell people of with its payload"


def make_some_messages_deadly() -> None:
    """Have this process die whenever it handles one of them."""
    read, retry = Consumer._read, publisher.retry_publication
    review, copy = publisher.review_publication, publisher.quarantine_publication

    def deadly_read(self: Consumer, delivery: Delivery) -> RetryRequest:
        if DEADLY_TO_READ.encode() in delivery.body:
            kill()
        return read(self, delivery)

    def deadly_retry(task: ClaimedRetry) -> Publication:
        if task.error_reason in (DEADLY_TO_RETRY, DEADLY_TO_CARRY):
            kill()
        return retry(task)

    def deadly_review(task: ClaimedRetry, reason: str, queue: str, *, with_payload: bool) -> Publication:
        if with_payload and task.error_reason == DEADLY_TO_CARRY:
            kill()
        return review(task, reason, queue, with_payload=with_payload)

    def deadly_copy(kept: ClaimedQuarantine, queue: str, *, with_payload: bool) -> Publication:
        if with_payload and DEADLY_TO_CARRY.encode() in kept.raw_body:
            kill()
        return copy(kept, queue, with_payload=with_payload)

    Consumer._read = deadly_read  # type: ignore[method-assign]
    publisher.retry_publication = deadly_retry
    publisher.review_publication = deadly_review
    publisher.quarantine_publication = deadly_copy


ACTIONS: dict[str, Callable[[], None]] = {"kill": kill, "freeze": freeze, "hang": hang, "fail": fail}


class Failpoints:
    """A folder of armed points. Of programs that share it, the first to come to a point fails."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def settings(self) -> dict[str, str]:
        """What the program must be told."""
        return {FOLDER_VARIABLE: str(self._folder)}

    def arm(self, point: Point, action: str) -> None:
        """Let `action`, one of ACTIONS, happen when a program next comes to `point`."""
        assert action in ACTIONS
        written = self._folder / f".{point}"
        written.write_text(action)
        written.rename(self._folder / point)

    def reached(self, point: Point) -> bool:
        """Whether a program has come to `point` since it was armed."""
        return not (self._folder / point).exists()

    def act(self, point: Point) -> None:
        """Do what was asked for at `point`, if anything was."""
        taken = self._folder / f".{point}.{os.getpid()}"
        try:
            (self._folder / point).rename(taken)
        except FileNotFoundError:
            return
        ACTIONS[taken.read_text()]()


if __name__ == "__main__":
    make_some_messages_deadly()
    failpoints.listen(Failpoints(Path(os.environ[FOLDER_VARIABLE])).act)
    sys.exit(main())
