"""How one instance is: for its pages, for the metric service_up, and in one line for the service manager."""

import asyncio
import time

from retry_scheduler.broker.connection import SERVER as RABBITMQ
from retry_scheduler.broker.intake_link import IntakeLink
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.database import SERVER as POSTGRESQL
from retry_scheduler.database import Database
from retry_scheduler.errors import Unavailable
from retry_scheduler.pause import Pause
from retry_scheduler.presence import Presence

ALARM = "the broker has a memory or disk alarm and takes no messages"


class Health:
    """Asks the parts of one instance."""

    def __init__(
        self,
        service_name: str,
        database: Database,
        intake: IntakeLink,
        link: PublishLink,
        presence: Presence,
        pause: Pause,
        stop: asyncio.Event,
    ) -> None:
        self._service_name = service_name
        self._database = database
        self._intake = intake
        self._link = link
        self._presence = presence
        self._pause = pause
        self._stop = stop
        self._started = False

    def started(self) -> None:
        """Note that the tables are there, and that everything runs from now on."""
        self._started = True

    async def check_postgresql(self) -> None:
        """Raise Unavailable unless PostgreSQL answers."""
        await self._database.probe()

    async def check_rabbitmq(self) -> None:
        """Raise Unavailable unless RabbitMQ answers through each connection, and takes messages."""
        if self._link.blocked:
            raise Unavailable(RABBITMQ, f"blocked: {ALARM}")
        # Nothing is consumed before the tables are there; that is not RabbitMQ's fault.
        links = (self._link, self._intake) if self._started else (self._link,)
        if not all(link.up for link in links):
            raise Unavailable(RABBITMQ, "not connected")
        await asyncio.gather(*(link.round_trip() for link in links))

    async def check_usable(self) -> None:
        """Raise Unavailable unless the service could do all its work now."""
        reason = self.not_ready_because()
        if reason is not None:
            raise Unavailable(self._service_name, reason)
        await asyncio.gather(self.check_postgresql(), self.check_rabbitmq())

    def not_ready_because(self) -> str | None:
        """Return why the service does not do all its work now, from what is known without asking; or None."""
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

    def status(self) -> str:
        """Return one line for people who look at the process from outside."""
        away = []
        if not self._started or self._presence.fenced(time.monotonic()):
            away.append(POSTGRESQL)
        if not self._link.up or (self._started and not self._intake.up):
            away.append(RABBITMQ)
        if away:
            return f"waiting for {' and '.join(away)}"
        if self._link.blocked:
            return f"waiting for RabbitMQ: {ALARM}"
        return self._pause.reason() if self._pause.active else "healthy"
