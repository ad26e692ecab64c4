"""Draws the live picture: the flow with its counts, and a line for each message that has failed.

Pure: evidence in, one screen of at most so many lines and columns out. Nothing is ever wrapped.
"""

from collections.abc import Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from retry_scheduler.demo.events import Event
from retry_scheduler.demo.evidence import Evidence
from retry_scheduler.demo.journeys import Journey, State, journeys

# From this width on there is room for the reason of each failure.
WIDE_COLUMNS = 104
# Beyond this a line is hard to follow with the eyes.
WIDEST_COLUMNS = 132
# The story's 14 failing invoices fit a terminal of 24 lines; from this height on there is room for air.
ROOMY_LINES = 26
# And from here on for the latest events below the table.
EVENT_LINES = 32
BAR_CELLS = 26
# Below the arrow into retry_queue: that is where messages leave for manual review.
REVIEW_INDENT = 44

STYLES = {
    State.ASKING: "red",
    State.WAITING: "yellow",
    State.DUE: "bright_yellow",
    State.BACK: "cyan",
    State.RECOVERED: "green",
    State.REVIEW: "magenta",
    State.QUARANTINED: "magenta",
}


class Picture:
    """What stays the same on every screen: the texts."""

    def __init__(self, explanation: Sequence[str], began: datetime) -> None:
        """explanation: lines of at most 78 columns. began: from when the seconds in the title count."""
        self._explanation = explanation
        self._began = began

    def screen(
        self,
        evidence: Evidence,
        events: Sequence[Event],
        *,
        now: datetime,
        columns: int,
        lines: int,
        hint: str = "",
    ) -> RenderableType:
        """Return the whole screen.

        events: the latest last; shown where there is room below the table. hint: for the title's end.
        """
        columns = min(columns, WIDEST_COLUMNS)
        found = journeys(evidence, now)
        roomy = lines >= ROOMY_LINES
        head: list[RenderableType] = [
            _title(f"{(now - self._began).total_seconds():.0f} s   {hint}", columns),
            *_blank(roomy),
            _flow(evidence, found),
            Text(),
            *(Text(f" {line}", no_wrap=True, overflow="ellipsis") for line in self._explanation),
            Text(),
            _totals(evidence, found),
            *_blank(roomy),
        ]
        taken = 1 + 3 + 1 + len(self._explanation) + 1 + 1 + 1 + 2 * roomy  # with the table's heading
        shown = _most_interesting(found, max(lines - taken, 1))
        below = lines - taken - len(shown) - 2
        return Group(
            *head,
            _table(shown, now, columns),
            *(_latest(events[-below:]) if lines >= EVENT_LINES and below > 0 else ()),
        )


def _title(right: str, columns: int) -> Text:
    left = " retry-scheduler demo"
    return Text(
        left + " " * max(1, columns - len(left) - len(right)) + right,
        style="bold white on blue",
        no_wrap=True,
        overflow="crop",
    )


def _blank(wanted: bool) -> tuple[Text, ...]:
    return (Text(),) if wanted else ()


def _flow(evidence: Evidence, found: Sequence[Journey]) -> Table:
    failures = sum(not delivery.succeeded for delivery in evidence.deliveries)
    back = sum(row.status == "retried" for row in evidence.rows)
    waiting = sum(journey.state in (State.WAITING, State.DUE) for journey in found)
    stored = len(evidence.rows) + len(evidence.quarantined)
    stops = (
        ("orders", f"{len(evidence.sent):2} sent", "bold"),
        ("consumer fails", f"{failures:2} failures", "bold red"),
        ("retry.scheduled", f"{stored:2} requests", "bold"),
        ("retry_queue (PostgreSQL)", f"{waiting:2} waiting", "bold yellow"),
        ("orders", f"{back:2} back", "bold cyan"),
    )
    table = Table.grid(padding=0)
    for _ in range(2 * len(stops)):
        table.add_column(no_wrap=True)
    cells = [
        [Text(" ") if place == 0 else Text(" → ", "dim"), Text(name, "bold")]
        for place, (name, _, _) in enumerate(stops)
    ]
    table.add_row(*[cell for pair in cells for cell in pair])
    counts = [[Text(), Text(count, style)] for _, count, style in stops]
    table.add_row(*[cell for pair in counts for cell in pair])
    review = Text.assemble(
        ("└→ ", "dim"), ("manual-review.pending ", "bold"), (f" {len(evidence.copies)}", "bold magenta")
    )
    grid = Table.grid(padding=0)
    grid.add_column(no_wrap=True)
    grid.add_row(table)
    grid.add_row(Text(" " * REVIEW_INDENT).append_text(review))
    return grid


def _totals(evidence: Evidence, found: Sequence[Journey]) -> Text:
    at_once = sum(delivery.succeeded and not delivery.retry_count for delivery in evidence.deliveries)
    states = [journey.state for journey in found]
    recovered = states.count(State.RECOVERED)
    people = states.count(State.REVIEW) + states.count(State.QUARANTINED)
    return Text.assemble(
        " Invoices:   ",
        (f"{at_once} succeeded at once", "green"), "   ",
        (f"{recovered} recovered", "bold green"), "   ",
        (f"{len(found) - recovered - people} under way", "yellow"), "   ",
        (f"{people} for people", "magenta"),
        no_wrap=True, overflow="ellipsis",
    )  # fmt: skip


def _most_interesting(found: Sequence[Journey], count: int) -> list[Journey]:
    """Leave out what ended first, if there is not room for all, and keep the order."""
    ranked = sorted(found, key=lambda journey: (journey.state.is_end, -journey.since.timestamp()))
    kept = {id(journey) for journey in ranked[:count]}
    return [journey for journey in found if id(journey) in kept]


def _table(shown: Sequence[Journey], now: datetime, columns: int) -> Table:
    wide = columns >= WIDE_COLUMNS
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold dim", width=columns)
    table.add_column(" INVOICE", width=9, no_wrap=True)
    table.add_column("CONSUMER", width=13, no_wrap=True)
    if wide:
        table.add_column("BECAUSE", width=30, no_wrap=True)
    table.add_column("RETRY", width=6, no_wrap=True)
    table.add_column("NOW", ratio=1, no_wrap=True)
    for journey in shown:
        style = STYLES[journey.state]
        cells = [
            Text(f" {journey.name}"),
            Text(journey.plan),
            Text(_retry(journey)),
            _now(journey, now, style),
        ]
        if wide:
            cells.insert(2, Text(journey.reason, style="dim"))
        table.add_row(*cells)
    return table


def _retry(journey: Journey) -> str:
    return f"{journey.retries} of {journey.of}" if journey.of is not None else "-"


def _now(journey: Journey, now: datetime, style: str) -> Text:
    match journey.state:
        case State.WAITING:
            left_s = (journey.until - now).total_seconds()
            whole_s = (journey.until - journey.since).total_seconds()
            done = round(BAR_CELLS * (1 - left_s / whole_s))
            return Text.assemble(
                (f"waits {left_s:4.1f} s  ", style),
                ("━" * done, style),
                ("─" * (BAR_CELLS - done), "bright_black"),
            )
        case State.RECOVERED:
            return Text(
                f"✔ recovered after {journey.retries} {'retry' if journey.retries == 1 else 'retries'}", style
            )
        case State.REVIEW:
            return Text("✘ in manual review: no retries left", style)
        case State.QUARANTINED:
            return Text(f"✘ in manual review: bad {journey.remark}", style)
        case State.ASKING:
            return Text("failed, and asks for a retry", style)
        case State.DUE:
            return Text("due: goes back to orders", style)
        case State.BACK:
            return Text("is back on orders", style)


def _latest(events: Sequence[Event]) -> tuple[RenderableType, ...]:
    lines = [
        Text(f" {event.name}  {event.text}", style="dim", no_wrap=True, overflow="ellipsis")
        for event in events
    ]
    return (Text(), Text(" LATEST EVENTS", style="bold dim"), *lines)
