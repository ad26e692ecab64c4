"""The set-up that tests of faults share: a service behind a proxy, under a steady load, that flows."""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from chaos.proxy import Proxy, proxies
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.service_process import ServiceProcess, StartService
from tests.table import Table
from tests.under_load import accounts, first_retry_s, flowing, requests, through
from tests.upstream import Load, Message, Upstream


@dataclass(frozen=True)
class Flow:
    """A service whose retries flow. link: the proxy that it was started behind."""

    service: ServiceProcess
    load: Load
    link: Proxy
    scene: "Scene"
    payload_bytes: int

    async def goes_on(self, count: int = 50, *, within: timedelta = timedelta(seconds=10)) -> None:
        """Wait until `count` more retries have been confirmed."""
        await flowing(self.service, count=count, within=within)

    async def first_retry_s(self, since: float, *, within: timedelta = timedelta(seconds=10)) -> float:
        """As the function of this name."""
        return await first_retry_s(self.scene.table, since, within=within)

    async def accounts(self, **promises: Any) -> list[Message]:
        """As the function of this name; `promises` are what it asserts."""
        return await accounts(
            self.load,
            self.scene.upstream,
            self.scene.table,
            [self.service],
            payload_bytes=self.payload_bytes,
            **promises,
        )


@dataclass(frozen=True)
class Scene:
    """A test's own database and virtual host, and the programs around the service."""

    start_service: StartService
    upstream: Upstream
    table: Table
    rabbitmq: PrivateRabbitMQ
    vhost: str

    @asynccontextmanager
    async def under_load(
        self,
        behind: Literal["RabbitMQ", "PostgreSQL"],
        *,
        per_second: float = 200,
        payload_bytes: int = 100,
        **settings: str,
    ) -> AsyncIterator[Flow]:
        """Start a service with a proxy before one of its servers, and a load; wait until retries flow."""
        self.upstream.declare("orders")
        port = self.rabbitmq.port if behind == "RabbitMQ" else self.table.database.port
        with ExitStack() as stack:
            (link,) = stack.enter_context(proxies(port))
            if behind == "RabbitMQ":
                settings["RABBITMQ_URL"] = through(link, self.vhost)
            else:
                settings["POSTGRES_PORT"] = str(link.port)
            service = await self.start_service(**{"RABBITMQ_PREFETCH": "100", **settings})
            load = stack.enter_context(
                Load(self.upstream, requests(payload_bytes=payload_bytes), per_second=per_second)
            )
            flow = Flow(service, load, link, self, payload_bytes)
            await flow.goes_on()
            yield flow
