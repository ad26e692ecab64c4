"""Puts the parts together, starts them, and stops them in order. Nothing else opens or closes anything.

start    pages and publishing link first (503 until the servers are there), then PostgreSQL and its
         tables, then the intake; each server is waited for, one warning a try
running  consumer, scheduler, both broker links, pages, supervision; one that dies takes the service
         down loudly
stop     stop taking, store what has arrived, settle what is in hand, close; at most STOP_WITHIN_S
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import structlog

from retry_scheduler.agenda import Agenda
from retry_scheduler.archive import archive_daily
from retry_scheduler.backoff import BackoffPolicy
from retry_scheduler.broker.connection import SERVER as RABBITMQ
from retry_scheduler.broker.intake_link import IntakeLink
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.consumer import Consumer
from retry_scheduler.database import SERVER as POSTGRESQL
from retry_scheduler.database import Database, DatabaseAddress
from retry_scheduler.errors import Unavailable
from retry_scheduler.http_api import build_app, build_server, listen
from retry_scheduler.observability import logs
from retry_scheduler.observability.live import LiveFigures
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.observability.metrics_server import serve_metrics
from retry_scheduler.pause import Pause
from retry_scheduler.presence import Presence
from retry_scheduler.publisher import Publisher
from retry_scheduler.repository import Repository
from retry_scheduler.rotation import with_fresh_secrets
from retry_scheduler.scheduler import MAX_OUTSTANDING, Scheduler
from retry_scheduler.schema import migrate
from retry_scheduler.settings import Settings
from retry_scheduler.settlement import Settler
from retry_scheduler.supervision import Progress, ServiceManager, Supervisor

if TYPE_CHECKING:  # loading it would load OpenTelemetry
    from retry_scheduler.observability.tracing import Tracing

log = structlog.get_logger()

# The promise is 20 s, and closing two silent servers takes up to 7. A confirm may take 10.
STOP_WITHIN_S = 12.0

LINKS_CLOSE_WITHIN_S = 3.0

# While a server is away at the start: one warning a second tells enough.
START_PAUSE_S = 1.0


def database_address(settings: Settings) -> DatabaseAddress:
    """Return where the settings say that PostgreSQL is."""
    password = settings.postgres_password
    return DatabaseAddress(
        host=settings.postgres_host,
        port=settings.postgres_port,
        database=settings.postgres_db,
        user=settings.postgres_user,
        password=password.get_secret_value() if password else None,
        tls=settings.postgres_ssl,
    )


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
        self._progress = Progress()
        self._supervisor = Supervisor(manager or ServiceManager(), self._progress, self._status)
        self._tracing = tracing
        self._metrics = Metrics()
        self._agenda = Agenda()
        self._presence = Presence()
        self._stop = asyncio.Event()
        self._started = False
        self._deaths: list[Exception] = []
        self._database = Database(
            database_address(settings),
            pool_min=min(settings.postgres_pool_min, settings.postgres_pool_max),
            pool_max=settings.postgres_pool_max,
        )
        self._repository = Repository(self._database)
        self._name = logs.instance_name()
        queues = (settings.retry_queue, settings.manual_review_queue)
        self._intake = IntakeLink(
            self._broker_url,
            queue=settings.retry_queue,
            queues=queues,
            prefetch=settings.rabbitmq_prefetch,
            name=f"{settings.service_name} consumer {self._name}",
            on_problem=self._report_intake_problem,
        )

        def publish_link(purpose: str) -> PublishLink:
            return PublishLink(
                self._broker_url,
                queues=queues,
                name=f"{settings.service_name} {purpose} {self._name}",
                on_problem=self._report_publish_problem,
            )

        self._link = publish_link("publisher")
        policy = BackoffPolicy(
            base=timedelta(milliseconds=settings.base_delay_ms),
            cap=timedelta(milliseconds=settings.max_delay_ms),
            jitter=timedelta(milliseconds=settings.jitter_ms),
        )
        settler = Settler(
            self._repository,
            Publisher(
                self._link,
                spare_link=lambda: publish_link("spare publisher"),
                manual_review_queue=settings.manual_review_queue,
            ),
            self._agenda,
            self._metrics,
            policy=policy,
            max_publish_failures=settings.max_publish_failures,
            tracing=tracing,
        )
        self._scheduler = Scheduler(
            self._repository,
            self._link,
            settler,
            self._agenda,
            self._presence,
            self._metrics,
            name=self._name,
            poll_interval=settings.poll_interval,
            progress=self._progress,
            paused=settings.start_paused,
        )
        self._pause = Pause(self._repository, paused=settings.start_paused, on_release=self._scheduler.resume)
        self._consumer = Consumer(
            self._intake,
            self._repository,
            self._agenda,
            self._metrics,
            policy=policy,
            own_queues=queues,
            default_max_retries=settings.default_max_retries,
            progress=self._progress,
            on_malformed=self._scheduler.look_at_quarantine,
            tracing=tracing,
        )

    def request_stop(self) -> None:
        """Begin to stop; harmless when repeated."""
        self._stop.set()

    def reload_secrets(self, load: Callable[[], Settings]) -> None:
        """Make every further connection with the secrets that `load` finds; those that are open go on."""
        self._settings = with_fresh_secrets(self._settings, load)
        self._database.connect_from_now_on_to(database_address(self._settings))
        for link in (self._intake, self._link):
            link.connect_from_now_on_to(self._broker_url)

    @property
    def _broker_url(self) -> str:
        return self._settings.rabbitmq_url.get_secret_value()

    def release(self) -> None:
        """Begin to claim, if START_PAUSED has held it back; harmless when repeated."""
        self._pause.release()

    async def run(self) -> None:
        """Serve until `request_stop`. Raises PortTaken or UnusableSchema, or a group if a part dies."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        live = LiveFigures(loop, count=self._repository.queue_figures, check=self._check_usable)
        self._metrics.watch(service=settings.service_name, up=live.up, figures=live.queue)
        with listen(settings.http_host, settings.http_port) as socket:
            metrics_server = serve_metrics(
                self._metrics.registry,
                host=settings.http_host,
                port=settings.metrics_port,
                on_death=lambda error: loop.call_soon_threadsafe(self._note_death, "metrics", error),
            )
            pages = build_server(
                build_app(
                    settings.service_name,
                    {"postgresql": self._database.probe, "rabbitmq": self._check_broker},
                    self._not_ready_because,
                    self._pause.shown,
                )
            )
            serving = self._start_part("pages", pages.serve(sockets=[socket]))
            supervising = self._start_part("supervision", self._supervisor.run(self._stop))
            log.info("Service starting", instance=self._name, most_duplicates_if_killed=MAX_OUTSTANDING)
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
                await self._database.close()
                log.info("Service stopped")
        if self._deaths:
            raise ExceptionGroup("a part of the service died", self._deaths)

    async def _work(self) -> None:
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        links = [self._start_part("publish link", self._link.run())]
        try:
            await _first_of(self._open_database(), stopping)
            if not self._stop.is_set():
                links.append(self._start_part("intake link", self._intake.run()))
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
            log.error("A part of the service failed while stopping", part=name, exc_info=error)
            return
        log.critical("A part of the service died - stopping", part=name, error=repr(error))
        self._deaths.append(error)
        self._stop.set()

    async def _run_loops(self, stopping: "asyncio.Task[bool]") -> None:
        """Run consumer and scheduler until told to stop, then give them STOP_WITHIN_S to finish."""
        self._started = True
        # Both stop at once: what the consumer still stores stays pending for whoever runs next.
        loops = asyncio.create_task(self._consume_and_schedule(), name="loops")
        await asyncio.wait((loops, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not loops.done():
            log.info("Service stopping")
            await asyncio.wait((loops,), timeout=STOP_WITHIN_S)
        if not loops.done():
            log.warning(
                "Stopping without settling everything: a server does not answer; the rest will be taken over"
            )
            loops.cancel()
            await asyncio.gather(loops, return_exceptions=True)
            return
        loops.result()

    async def _consume_and_schedule(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._consumer.run(self._stop), name="consumer")
            group.create_task(self._scheduler.run(self._stop), name="scheduler")
            group.create_task(self._keep_house(), name="archive")

    async def _keep_house(self) -> None:
        await self._pause.watch(self._stop)  # nothing is moved while an operator looks into a restored table
        if self._settings.retention_days:
            await archive_daily(self._database, self._settings.retention, self._stop)

    async def _open_database(self) -> None:
        while True:
            try:
                for migration in await migrate(self._database):
                    log.info("Database migrated", migration=migration.name)
                await self._database.open()
                return
            except Unavailable as problem:
                self._metrics.reconnecting(problem.server)
                log.warning(logs.POSTGRES_FAILED, error=problem.problem)
            await asyncio.sleep(START_PAUSE_S)

    async def _check_broker(self) -> None:
        if self._link.blocked:
            raise Unavailable(
                RABBITMQ, "blocked: the broker has a memory or disk alarm and takes no messages"
            )
        # Nothing is consumed before the tables are there; that is not RabbitMQ's fault.
        links = (self._link, self._intake) if self._started else (self._link,)
        if not all(link.up for link in links):
            raise Unavailable(RABBITMQ, "not connected")
        await asyncio.gather(*(link.round_trip() for link in links))

    def _not_ready_because(self) -> str | None:
        if self._stop.is_set():
            return "stopping"
        if not self._started:
            return "starting"
        if self._link.blocked:
            return "blocked"
        if not self._intake.up or not self._link.up:
            return "not connected to RabbitMQ"
        if self._presence.fenced(time.monotonic()):
            return "no beat reaches PostgreSQL: nothing may be published"
        return self._pause.reason() if self._pause.active else None

    def _status(self) -> str:
        away = []
        if not self._started or self._presence.fenced(time.monotonic()):
            away.append(POSTGRESQL)
        if not self._link.up or (self._started and not self._intake.up):
            away.append(RABBITMQ)
        if away:
            return f"waiting for {' and '.join(away)}"
        if self._link.blocked:
            return "waiting for RabbitMQ: it has a memory or disk alarm and takes no messages"
        return "healthy"

    async def _check_usable(self) -> None:
        reason = self._not_ready_because()
        if reason is not None:
            raise Unavailable(self._settings.service_name, reason)
        await asyncio.gather(self._database.probe(), self._check_broker())

    def _report_intake_problem(self, problem: Unavailable) -> None:
        self._report_problem(problem, logs.CONSUMER_FAILED)

    def _report_publish_problem(self, problem: Unavailable) -> None:
        self._report_problem(problem, logs.RABBITMQ_FAILED)

    def _report_problem(self, problem: Unavailable, event: str) -> None:
        if not self._stop.is_set():
            self._metrics.reconnecting(problem.server)
            log.warning(event, error=problem.problem)


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
