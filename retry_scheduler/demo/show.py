"""Puts the demo together: stage, team, watch, screen, summary; and ends it, however that comes.

start the servers and the service -> send invoices, watch what becomes of them -> all have come to
an end, or it takes too long -> count and judge -> (stay, if wanted) -> end and remove everything
"""

import asyncio
import signal
import sys
import time
from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

from retry_scheduler.demo.evidence import Evidence
from retry_scheduler.demo.folder import TemporaryFolder
from retry_scheduler.demo.guide import guide_lines
from retry_scheduler.demo.invoices import make_invoices
from retry_scheduler.demo.processes import PrivateServerError
from retry_scheduler.demo.report import summary_lines
from retry_scheduler.demo.screens import LiveScreen, PlainLines
from retry_scheduler.demo.stage import Stage
from retry_scheduler.demo.summary import Summary, summarise
from retry_scheduler.demo.team import ORDERS, Team
from retry_scheduler.demo.view import Picture
from retry_scheduler.demo.watch import Watch
from retry_scheduler.errors import Unavailable
from retry_scheduler.exit_codes import EX_OK, EX_UNAVAILABLE, EX_WRONG
from retry_scheduler.settings import Settings

SHOW_EVERY_S = 0.1

# The longest story takes 17 s. On a machine that is busy with other things it may take longer, but a
# message that has not come to its end by then is lost.
LONGEST_S = 60.0

# Long enough for a second copy of something to come as well, if there is one.
QUIET_S = 0.5


def run_demo(*, keep: bool) -> int:
    """Run the demo and return its exit code: 0 if all counts are right, 1 if not, 69 if a server is missing.

    keep: stay up after the summary, until SIGINT or SIGTERM. Otherwise those end it with 128 + number.
    """
    return asyncio.run(_Demo(keep=keep).run())


class _Demo:
    """One run."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._live = sys.stdout.isatty()
        self._console = Console() if self._live else Console(color_system=None, force_terminal=False)
        self._began = time.monotonic()
        self._signal: int | None = None
        self._code: int | None = None
        self._last_words = ""

    async def run(self) -> int:
        """Run to the end and return the exit code."""
        self._take_signals()
        try:
            await self._run_on_stage()
        except* (PrivateServerError, Unavailable) as group:
            for problem in _leaves(group):
                self._complain(f"retry-scheduler demo: {problem}")
            self._code = EX_UNAVAILABLE
        except* asyncio.CancelledError:
            if self._code is None:
                self._code = 128 + (self._signal or 0)
        finally:
            if self._last_words:
                self._complain(self._last_words)
            took_s = time.monotonic() - self._began
            self._say(f"Took {took_s:.1f} s. Everything is stopped, and the folder removed.")
        return EX_WRONG if self._code is None else self._code

    async def _run_on_stage(self) -> None:
        with TemporaryFolder() as folder:
            async with Stage(folder, self._say) as stage:
                await self._perform_or_keep_log(stage)

    async def _perform_or_keep_log(self, stage: Stage) -> None:
        try:
            await self._perform(stage)
        except (PrivateServerError, Unavailable, ExceptionGroup):
            if self._signal is None:  # otherwise it is the terminal that is gone, say
                self._last_words = stage.keep_log()
            raise

    async def _perform(self, stage: Stage) -> None:
        team = Team(stage.rabbitmq.url(), stage.settings.retry_queue, make_invoices())
        watch = Watch(stage.settings)
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(work) for work in (team.run(), watch.look_at_tables(), stage.guard())
            ]
            reading = tasks.create_task(watch.read_copies())
            await self._follow(team, watch, tasks.create_task(team.send()), stage.settings)
            await watch.look_once()
            summary = summarise(await _evidence_with_depths(team, watch, stage))
            reading.cancel()  # gives the copies back to their queue
            await asyncio.wait((reading,))
            self._sum_up(summary, stage)
            if self._keep:
                await self._stay(team, watch, stage)
            for task in running:
                task.cancel()

    async def _follow(
        self, team: Team, watch: Watch, sending: "asyncio.Task[None]", settings: Settings
    ) -> None:
        """Show what happens until every message has come to its end, or it takes too long."""
        explanation = _explanation(settings)
        began = datetime.now(UTC)
        if self._live:
            screen: LiveScreen | PlainLines = LiveScreen(self._console, Picture(explanation, began))
        else:
            screen = PlainLines(self._say, began)
            for line in ("", *explanation, ""):
                self._say(line)
        give_up_at = time.monotonic() + LONGEST_S
        end_at = give_up_at
        with screen:
            while time.monotonic() < end_at:
                evidence = _evidence(team, watch)
                screen.show(evidence)
                if end_at == give_up_at and sending.done() and not evidence.unfinished():
                    end_at = min(time.monotonic() + QUIET_S, give_up_at)
                await asyncio.sleep(SHOW_EVERY_S)
        if isinstance(screen, LiveScreen):
            screen.print_last(_evidence(team, watch))

    def _sum_up(self, summary: Summary, stage: Stage) -> None:
        self._say("")
        for line in summary_lines(summary):
            self._say(line)
        self._say("")
        if summary.problems:
            self._last_words = stage.keep_log()
        self._code = EX_WRONG if summary.problems else EX_OK
        if not self._keep and not summary.problems:
            self._say("Next: README.md says how to run it with servers of your own,")
            self._say("and `KEEP=1 make demo` stays up for you to send messages yourself.")

    async def _stay(self, team: Team, watch: Watch, stage: Stage) -> None:
        """Tell of each event until cancelled."""
        lines = PlainLines(self._say, datetime.now(UTC))
        lines.skip(_evidence(team, watch))
        for line in guide_lines(stage):
            self._say(line)
        while True:
            await asyncio.sleep(SHOW_EVERY_S)
            lines.show(_evidence(team, watch))

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        this = asyncio.current_task()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

        def end(number: int) -> None:
            self._signal = number
            for each in numbers:
                # A second one finds the system's own handler, which ends this process at once; then the
                # servers end by themselves, and the folder goes with them.
                loop.remove_signal_handler(each)
                signal.signal(each, signal.SIG_DFL)
            if this is not None:
                this.cancel()

        for number in numbers:
            loop.add_signal_handler(number, end, number)

    def _say(self, line: str | Text) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _complain(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _evidence(team: Team, watch: Watch) -> Evidence:
    return Evidence(team.sent, team.deliveries, watch.rows, watch.quarantined, watch.copies)


async def _evidence_with_depths(team: Team, watch: Watch, stage: Stage) -> Evidence:
    seen = _evidence(team, watch)
    queues = (ORDERS, stage.settings.retry_queue, stage.settings.manual_review_queue)
    depths = {queue: await asyncio.to_thread(stage.rabbitmq.queue_depth, "/", queue) for queue in queues}
    return Evidence(seen.sent, seen.deliveries, seen.rows, seen.quarantined, seen.copies, depths)


def _explanation(settings: Settings) -> list[str]:
    delays = ", ".join(
        f"{settings.base_delay_ms * 2**n / 1000:g}" for n in range(settings.default_max_retries)
    )
    return [
        "Each failure becomes a request: the service stores it, and sends the invoice",
        f"back when it is due, after {delays} s (+ up to {settings.jitter_ms / 1000:g} s). "
        f"After {settings.default_max_retries} retries: to people.",
    ]


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
