"""Shows what happens: a live picture in a terminal, plain lines anywhere else."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live

from retry_scheduler.demo.events import Event, EventTeller
from retry_scheduler.demo.evidence import Evidence
from retry_scheduler.demo.view import Picture

MOST_EVENTS_SHOWN = 100
ROOM_FOR_ALL = 24
# Longer than between two looks at the tables, or events would be told out of order.
HELD_BACK = timedelta(seconds=0.4)


class LiveScreen:
    """The live picture, on the terminal's second screen: the first one is as it was afterwards."""

    def __init__(self, console: Console, picture: Picture) -> None:
        self._console = console
        self._picture = picture
        self._teller = EventTeller()
        self._events: list[Event] = []
        # The second screen is drawn over itself, not erased before: nothing flickers.
        self._live = Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> Self:
        """Take the terminal."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal back."""
        self._live.stop()

    def show(self, evidence: Evidence) -> None:
        """Draw the picture anew."""
        self._events = [*self._events, *self._teller.news(evidence, _a_moment_ago())][-MOST_EVENTS_SHOWN:]
        columns, lines = self._console.size
        picture = self._picture.screen(
            evidence,
            self._events,
            now=datetime.now(UTC),
            columns=columns,
            lines=lines,
            hint="Ctrl-C ends it ",
        )
        self._live.update(picture, refresh=True)

    def print_last(self, evidence: Evidence) -> None:
        """Print the picture once more, to stay on the first screen; for after the terminal was given back."""
        columns, _ = self._console.size
        self._console.print(
            self._picture.screen(evidence, (), now=datetime.now(UTC), columns=columns, lines=ROOM_FOR_ALL)
        )


class PlainLines:
    """One line for each event, without control characters."""

    def __init__(self, say: Callable[[str], None], began: datetime) -> None:
        """began: from when the seconds in front of each line count."""
        self._say = say
        self._began = began
        self._teller = EventTeller()

    def __enter__(self) -> Self:
        """Do nothing: lines need no preparation."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""

    def skip(self, evidence: Evidence) -> None:
        """Take what has happened so far as told."""
        self._teller.news(evidence, datetime.now(UTC))

    def show(self, evidence: Evidence) -> None:
        """Print what is new."""
        for event in self._teller.news(evidence, _a_moment_ago()):
            self._say(f"{(event.at - self._began).total_seconds():6.2f} s  {event.name}  {event.text}")


def _a_moment_ago() -> datetime:
    return datetime.now(UTC) - HELD_BACK
