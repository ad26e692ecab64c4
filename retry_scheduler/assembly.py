"""Builds the parts of one instance from its settings, and connects them. Starts none of them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import structlog

from retry_scheduler.agenda import Agenda
from retry_scheduler.backoff import BackoffPolicy
from retry_scheduler.broker.intake_link import IntakeLink
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.broker.spare_links import SpareLinks
from retry_scheduler.consumer import Consumer
from retry_scheduler.database import Database, DatabaseAddress
from retry_scheduler.errors import Unavailable
from retry_scheduler.health import Health
from retry_scheduler.observability import events, logs
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.pause import Pause
from retry_scheduler.presence import Presence
from retry_scheduler.publisher import Publisher
from retry_scheduler.repository import Repository
from retry_scheduler.scheduler import Scheduler
from retry_scheduler.settings import Settings
from retry_scheduler.settlement import Settler
from retry_scheduler.supervision import Progress

if TYPE_CHECKING:  # loading it would load OpenTelemetry
    from retry_scheduler.observability.tracing import Tracing

log = structlog.get_logger()


@dataclass(frozen=True)
class Instance:
    """What one instance consists of, as far as somebody has to start, ask or stop it."""

    name: str
    database: Database
    repository: Repository
    intake: IntakeLink
    link: PublishLink
    spare_links: SpareLinks
    consumer: Consumer
    scheduler: Scheduler
    pause: Pause
    health: Health
    metrics: Metrics
    progress: Progress

    def connect_from_now_on_as(self, settings: Settings) -> None:
        """Make every further connection where and as `settings` say; those that are open go on."""
        self.database.connect_from_now_on_to(database_address(settings))
        for link in (self.intake, self.link):
            link.connect_from_now_on_to(broker_url(settings))


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


def broker_url(settings: Settings) -> str:
    """Return where the settings say that RabbitMQ is, secrets included."""
    return settings.rabbitmq_url.get_secret_value()


def assemble(settings: Settings, stop: asyncio.Event, tracing: "Tracing | None" = None) -> Instance:
    """Return the parts. stop: set once the service stops; then lost connections are no news any more."""
    name = logs.instance_name()
    metrics = Metrics()
    agenda = Agenda()
    presence = Presence()
    progress = Progress()
    queues = (settings.retry_queue, settings.manual_review_queue)

    def report(event: str) -> Callable[[Unavailable], None]:
        def note(problem: Unavailable) -> None:
            if not stop.is_set():
                metrics.reconnecting(problem.server)
                log.warning(event, error=problem.problem)

        return note

    database = Database(
        database_address(settings),
        pool_min=min(settings.postgres_pool_min, settings.postgres_pool_max),
        pool_max=settings.postgres_pool_max,
    )
    repository = Repository(database)
    intake = IntakeLink(
        broker_url(settings),
        queue=settings.retry_queue,
        queues=queues,
        prefetch=settings.rabbitmq_prefetch,
        name=f"{settings.service_name} consumer {name}",
        on_problem=report(events.CONSUMER_FAILED),
    )
    link = PublishLink(
        broker_url(settings),
        queues=queues,
        name=f"{settings.service_name} publisher {name}",
        on_problem=report(events.RABBITMQ_FAILED),
    )
    policy = BackoffPolicy(
        base=timedelta(milliseconds=settings.base_delay_ms),
        cap=timedelta(milliseconds=settings.max_delay_ms),
        jitter=timedelta(milliseconds=settings.jitter_ms),
    )
    spare_links = SpareLinks(lambda: link.another(f"{settings.service_name} spare publisher {name}"))
    publisher = Publisher(
        link,
        spare_links=spare_links,
        manual_review_queue=settings.manual_review_queue,
    )
    settler = Settler(
        repository,
        publisher,
        agenda,
        metrics,
        policy=policy,
        max_publish_failures=settings.max_publish_failures,
        tracing=tracing,
    )
    scheduler = Scheduler(
        repository,
        link,
        settler,
        agenda,
        presence,
        metrics,
        name=name,
        poll_interval=settings.poll_interval,
        progress=progress,
        paused=settings.start_paused,
    )
    pause = Pause(repository, paused=settings.start_paused, on_release=scheduler.resume)
    consumer = Consumer(
        intake,
        repository,
        agenda,
        metrics,
        policy=policy,
        own_queues=queues,
        default_max_retries=settings.default_max_retries,
        progress=progress,
        on_malformed=scheduler.look_at_quarantine,
        tracing=tracing,
    )
    return Instance(
        name=name,
        database=database,
        repository=repository,
        intake=intake,
        link=link,
        spare_links=spare_links,
        consumer=consumer,
        scheduler=scheduler,
        pause=pause,
        health=Health(settings.service_name, database, intake, link, presence, pause, stop),
        metrics=metrics,
        progress=progress,
    )
