"""Checks, without changing anything, whether the service could do its work: `retry-scheduler check`."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from retry_scheduler.broker.topology import queue_states
from retry_scheduler.database import Database
from retry_scheduler.errors import Unavailable, UnusableSchema
from retry_scheduler.schema import inspect
from retry_scheduler.service import database_address
from retry_scheduler.settings import Settings

EX_OK = 0
EX_UNAVAILABLE = 69
EX_CONFIG = 78


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the answer. exit_code: what the program should leave with because of it."""

    subject: str
    remark: str
    exit_code: int = EX_OK

    @property
    def line(self) -> str:
        """The finding as a person reads it."""
        return f"{'ok   ' if self.exit_code == EX_OK else 'WRONG'} {self.subject}: {self.remark}"


async def check_everything(settings: Settings) -> AsyncIterator[Finding]:
    """Yield what was found, PostgreSQL first."""
    yield await _check_database(settings)
    yield await _check_broker(settings)


async def _check_database(settings: Settings) -> Finding:
    where = f"PostgreSQL {settings.postgres_host}:{settings.postgres_port}/{settings.postgres_db}"
    try:
        state = await inspect(Database(database_address(settings), pool_min=0, pool_max=1))
    except Unavailable as problem:
        return Finding(where, problem.problem, EX_UNAVAILABLE)
    except UnusableSchema as problem:
        return Finding(where, str(problem), EX_CONFIG)
    if state.problem:
        return Finding(where, state.problem, EX_CONFIG)
    if state.missing:
        return Finding(
            where, f"reachable; `run` or `migrate` will apply {', '.join(m.name for m in state.missing)}"
        )
    return Finding(where, "reachable, tables up to date")


async def _check_broker(settings: Settings) -> Finding:
    queues = (settings.retry_queue, settings.manual_review_queue)
    try:
        states = await queue_states(
            settings.rabbitmq_url.get_secret_value(), queues, name=f"{settings.service_name} check"
        )
    except Unavailable as problem:
        return Finding("RabbitMQ", problem.problem, EX_UNAVAILABLE)
    missing = [queue for queue, state in states.items() if state is None]
    if missing:
        return Finding("RabbitMQ", f"reachable; `run` will create {', '.join(missing)}")
    return Finding("RabbitMQ", f"reachable, {' and '.join(queues)} exist")
