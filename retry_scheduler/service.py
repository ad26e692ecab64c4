"""Starts the parts of one instance and stops them in order. Nothing else opens or closes anything.

start    pages and publishing link first (503 until the servers are there), then PostgreSQL and its
         tables, then the intake; each server is waited for, one warning a try
running  consumer, scheduler, both broker links, pages, supervision; one that dies takes the service
         down loudly
stop     stop taking, store what has arrived, settle what is in hand, close; at most STOP_WITHIN_S
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from retry_scheduler.archive import archive_daily
from retry_scheduler.assembly import assemble
from retry_scheduler.errors import Unavailable
from retry_scheduler.hand import MAX_OUTSTANDING
from retry_scheduler.http_api import build_app, build_server, listen
from retry_scheduler.observability import events
from retry_scheduler.observability.live import LiveFigures
from retry_scheduler.observability.metrics_server import serve_metrics
from retry_scheduler.rotation import with_fresh_secrets
from retry_scheduler.schema import migrate
from retry_scheduler.settings import Settings
from retry_scheduler.supervision import ServiceManager, Supervisor

if TYPE_CHECKING:  # loading it would load OpenTelemetry
    from retry_scheduler.observability.tracing import Tracing

log = structlog.get_logger()

# The promise is 20 s, and closing two silent servers takes up to 7. A confirm may take 10.
STOP_WITHIN_S = 12.0

LINKS_CLOSE_WITHIN_S = 3.0

# While a server is away at the start: one warning a second tells enough.
START_PAUSE_S = 1.0


class Service:
    """One instance. `run` may be called once."""

    def __init__(
        self,
        settings: Settings,
        manager: ServiceManager | None = None,
        *,
        tracing: "Tracing | None" = None,
    ) -> None:
        """manager: whom to tell how the service is; None: nobody. tracing: closed by `run` at its end."""
        self._settings = settings
        self._tracing = tracing
        self._stop = asyncio.Event()
        self._deaths: list[Exception] = []
        self._parts = assemble(settings, self._stop, tracing)
        self._supervisor = Supervisor(
            manager or ServiceManager(), self._parts.progress, self._parts.health.status
        )

    def request_stop(self) -> None:
        """Begin to stop; harmless when repeated."""
        self._stop.set()

    def reload_secrets(self, load: Callable[[], Settings]) -> None:
        """Make every further connection with the secrets that `load` finds; those that are open go on."""
        self._settings = with_fresh_secrets(self._settings, load)
        self._parts.connect_from_now_on_as(self._settings)

    def release(self) -> None:
        """Begin to claim, if START_PAUSED has held it back; harmless when repeated."""
        self._parts.pause.release()

    async def run(self) -> None:
        """Serve until `request_stop`. Raises PortTaken or UnusableSchema, or a group if a part dies."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        parts, health = self._parts, self._parts.health
        live = LiveFigures(loop, count=parts.repository.queue_figures, check=health.check_usable)
        parts.metrics.watch(
            service=settings.service_name,
            up=live.up,
            blocked=lambda: parts.link.blocked,
            figures=live.queue,
        )
        with listen(settings.http_host, settings.http_port) as socket:
            metrics_server = serve_metrics(
                parts.metrics.registry,
                host=settings.http_host,
                port=settings.metrics_port,
                on_death=lambda error: loop.call_soon_threadsafe(self._note_death, "metrics", error),
            )
            pages = build_server(
                build_app(
                    settings.service_name,
                    {"postgresql": health.check_postgresql, "rabbitmq": health.check_rabbitmq},
                    health.not_ready_because,
                    parts.pause.shown,
                )
            )
            serving = self._start_part("pages", pages.serve(sockets=[socket]))
            supervising = self._start_part("supervision", self._supervisor.run(self._stop))
            log.info(events.STARTING, instance=parts.name, most_duplicates_if_killed=MAX_OUTSTANDING)
            try:
                await self._work()
            finally:
                self._stop.set()  # the parts may end now
                pages.should_exit = True
                leaving = [serving, supervising]
                if self._tracing is not None:
                    leaving.append(asyncio.create_task(asyncio.to_thread(self._tracing.close)))
                await asyncio.wait(leaving, timeout=2)
                live.close()
                await asyncio.to_thread(metrics_server.shutdown)
                metrics_server.server_close()
                await parts.database.close()
                log.info(events.STOPPED)
        if self._deaths:
            raise ExceptionGroup("a part of the service died", self._deaths)

    async def _work(self) -> None:
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        links = [
            self._start_part("publish link", self._parts.link.run()),
            self._start_part("spare links", self._parts.spare_links.run()),
        ]
        try:
            await _first_of(self._open_database(), stopping)
            if not self._stop.is_set():
                links.append(self._start_part("intake link", self._parts.intake.run()))
                await self._run_loops(stopping)
        finally:
            for task in links:
                task.cancel()
            await asyncio.wait(links, timeout=LINKS_CLOSE_WITHIN_S)
            stopping.cancel()

    def _start_part(self, name: str, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start what must not end before the service does. If it does, the service stops and `run` raises."""

        async def watched() -> None:
            try:
                await work
                if not self._stop.is_set():
                    raise RuntimeError(f"{name} ended by itself")
            except Exception as error:
                self._note_death(name, error)

        return asyncio.create_task(watched(), name=name)

    def _note_death(self, name: str, error: Exception) -> None:
        if self._stop.is_set():  # too late to harm anybody: the work was finished, or will be
            log.error(events.PART_FAILED_LATE, part=name, exc_info=error)
            return
        log.critical(events.PART_DIED, part=name, error=repr(error))
        self._deaths.append(error)
        self._stop.set()

    async def _run_loops(self, stopping: "asyncio.Task[bool]") -> None:
        """Run consumer and scheduler until told to stop, then give them STOP_WITHIN_S to finish."""
        self._parts.health.started()
        # Both stop at once: what the consumer still stores stays pending for whoever runs next.
        loops = asyncio.create_task(self._consume_and_schedule(), name="loops")
        await asyncio.wait((loops, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not loops.done():
            log.info(events.STOPPING)
            await asyncio.wait((loops,), timeout=STOP_WITHIN_S)
        if not loops.done():
            log.warning(events.UNSETTLED)
            loops.cancel()
            await asyncio.gather(loops, return_exceptions=True)
            return
        loops.result()

    async def _consume_and_schedule(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._parts.consumer.run(self._stop), name="consumer")
            group.create_task(self._parts.scheduler.run(self._stop), name="scheduler")
            group.create_task(self._keep_house(), name="archive")

    async def _keep_house(self) -> None:
        # Nothing is moved while an operator looks into a restored table.
        await self._parts.pause.watch(self._stop)
        if self._settings.retention_days:
            await archive_daily(self._parts.database, self._settings.retention, self._stop)

    async def _open_database(self) -> None:
        while True:
            try:
                for migration in await migrate(self._parts.database):
                    log.info(events.MIGRATED, migration=migration.name)
                await self._parts.database.open()
                return
            except Unavailable as problem:
                self._parts.metrics.reconnecting(problem.server)
                log.warning(events.POSTGRES_FAILED, error=problem.problem)
            await asyncio.sleep(START_PAUSE_S)


async def _first_of(work: Awaitable[None], stopping: "asyncio.Task[bool]") -> None:
    """Wait for `work`, or give it up when told to stop."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled():
        task.result()


async def serve(
    settings: Settings,
    manager: ServiceManager,
    *,
    load: Callable[[], Settings],
    tracing: "Tracing | None" = None,
) -> None:
    """Run one instance until SIGTERM or SIGINT; the second leaves at once.

    SIGHUP reloads the secrets; SIGUSR1 releases the instance if it has started paused.
    manager: see Service. load: returns the settings as they are by then. Errors as in Service.run.
    """
    service = Service(settings, manager, tracing=tracing)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, service.reload_secrets, load)
    loop.add_signal_handler(signal.SIGUSR1, service.release)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop_or_leave, service, number)
    await service.run()


def _stop_or_leave(service: Service, number: signal.Signals) -> None:
    service.request_stop()
    # A second signal finds the system's own handler, which ends the process.
    asyncio.get_running_loop().remove_signal_handler(number)
