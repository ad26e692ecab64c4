"""Checks, without changing anything, whether the service could do its work: `retry-scheduler check`.

ok     as it should be
warn   the service runs, but a promise of its contract does not hold in some case; exit code 0
WRONG  the service cannot do its work; the exit code says whose trouble it is
"""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Literal

from retry_scheduler.assembly import database_address
from retry_scheduler.broker.permission import require_publishing
from retry_scheduler.broker.topology import QueueShape, queue_shape, queue_states
from retry_scheduler.database import SESSION, Database
from retry_scheduler.errors import Unavailable, UnusableSchema
from retry_scheduler.exit_codes import EX_CONFIG, EX_OK, EX_UNAVAILABLE
from retry_scheduler.schema import INSPECT_WITHIN_S, SchemaState, inspect
from retry_scheduler.settings import Settings
from retry_scheduler.sql import query

_SHOWN = {"ok": "ok   ", "warn": "warn ", "wrong": "WRONG"}

# From this version on a quorum queue drops what was delivered so many times, unless told otherwise.
QUORUM_LIMIT_SINCE = 4
QUORUM_LIMIT = 20

_DURABILITY = {
    "fsync": "a crash of the machine may lose or destroy what was stored",
    "full_page_writes": "a crash of the machine may destroy what was stored",
    "synchronous_commit": (
        "a crash may lose what other programs have committed, such as an operator's changes; this program's "
        "own sessions set it to on"
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the answer. exit_code: what the program should leave with because of it."""

    subject: str
    remark: str = ""
    level: Literal["ok", "warn", "wrong"] = "ok"
    exit_code: int = EX_OK

    @property
    def line(self) -> str:
        """The finding as a person reads it."""
        return f"{_SHOWN[self.level]} {self.subject}" + (f": {self.remark}" if self.remark else "")


async def check_everything(settings: Settings) -> AsyncIterator[Finding]:
    """Yield what was found, PostgreSQL first."""
    async for finding in _check_database(settings):
        yield finding
    async for finding in _check_broker(settings):
        yield finding


async def _check_database(settings: Settings) -> AsyncIterator[Finding]:
    where = f"PostgreSQL {settings.postgres_host}:{settings.postgres_port}/{settings.postgres_db}"
    database = Database(database_address(settings), pool_min=0, pool_max=1)
    try:
        state = await inspect(database)
        yield _tables(where, state)
        for problem in await _weaknesses(database, settings, state):
            yield Finding(where, problem, "warn")
    except Unavailable as problem:
        yield Finding(where, problem.problem, "wrong", EX_UNAVAILABLE)
    except UnusableSchema as problem:
        yield Finding(where, str(problem), "wrong", EX_CONFIG)


def _tables(where: str, state: SchemaState) -> Finding:
    if state.problem:
        return Finding(where, state.problem, "wrong", EX_CONFIG)
    if state.missing:
        names = ", ".join(migration.name for migration in state.missing)
        return Finding(where, f"reachable; `run` or `migrate` will apply {names}")
    if state.newer:
        return Finding(where, f"reachable, tables newer than this program (version {state.version}): fine")
    return Finding(where, f"reachable, tables up to date (version {state.version})")


async def _weaknesses(database: Database, settings: Settings, state: SchemaState) -> list[str]:
    # Without our own settings, which would hide what the server has for everybody else.
    defaults = {"application_name": SESSION["application_name"]}
    async with database.session(within_s=INSPECT_WITHIN_S, settings=defaults) as connection:
        (durability,) = await connection.fetch(query("durability"))
        (rights,) = await connection.fetch(query("archive_rights"))
        (indexes,) = await connection.fetch(query("missing_indexes"))
    async with database.session(within_s=INSPECT_WITHIN_S) as connection:
        (ours,) = await connection.fetch(query("durability"))
    found = [f"{name} is off: {harm}" for name, harm in _DURABILITY.items() if durability[name] == "off"]
    if ours["synchronous_commit"] == "off":
        found.append(
            "synchronous_commit is off also in this program's sessions: something on the way, such as a "
            "pooler, drops their settings, and a crash may lose accepted messages"
        )
    if indexes["missing"] and not state.missing:
        found.append(
            f"no valid index {', '.join(indexes['missing'])}: every look reads the whole table; "
            "create it as `retry-scheduler migrate --sql` prints it"
        )
    if settings.retention_days and not state.missing and rights["lacking"]:
        found.append(
            f"nothing will be archived: this role lacks {', '.join(rights['lacking'])}; "
            "grant it, or set RETENTION_DAYS=0"
        )
    return found


async def _check_broker(settings: Settings) -> AsyncIterator[Finding]:
    queues = (settings.retry_queue, settings.manual_review_queue)
    url, name = settings.rabbitmq_url.get_secret_value(), f"{settings.service_name} check"
    try:
        states = await queue_states(url, queues, name=name)
        missing = [queue for queue, state in states.items() if state is None]
        if missing:
            yield Finding("RabbitMQ", f"reachable; `run` will create {', '.join(missing)}")
        else:
            yield Finding("RabbitMQ", f"reachable, {' and '.join(queues)} exist")
        await require_publishing(url, name=name)
        for queue in queues:
            if queue not in missing:
                shape = await queue_shape(url, queue, name=name)
                for problem in _losses(shape):
                    yield Finding(f"RabbitMQ queue {queue}", problem, "warn")
    except Unavailable as problem:
        yield Finding("RabbitMQ", problem.problem, "wrong", EX_UNAVAILABLE)


def _losses(shape: QueueShape) -> Iterator[str]:
    """Yield in which ways the broker may lose a message of this queue that it has confirmed."""
    arguments = shape.arguments
    exchange = arguments.get("x-dead-letter-exchange")
    loses = f"moves messages to the exchange {exchange!r}" if exchange is not None else "drops messages"
    if not shape.durable:
        yield "is not durable: its messages are gone when the broker restarts"
    if shape.auto_delete:
        yield "is deleted, with its messages, when its last consumer leaves"
    if "x-expires" in arguments:
        yield f"is deleted, with its messages, after {arguments['x-expires']} ms without a consumer"
    if "x-message-ttl" in arguments:
        yield f"{loses} after {arguments['x-message-ttl']} ms (x-message-ttl), as while this service is down"
    for limit in ("x-max-length", "x-max-length-bytes"):
        if limit in arguments and not str(arguments.get("x-overflow", "")).startswith("reject-publish"):
            yield f"{loses} beyond {arguments[limit]} ({limit}); x-overflow=reject-publish would refuse them"
    limit_times = arguments.get("x-delivery-limit", QUORUM_LIMIT if _has_limit_by_default(shape) else -1)
    if limit_times != -1:
        unless = "" if "x-delivery-limit" in arguments else ", the default unless x-delivery-limit=-1"
        yield f"{loses} that were delivered {limit_times} times{unless}, as by restarts of this service"
    if shape.unknown:
        yield f"may lose messages, its arguments could not be found out: {shape.unknown}"


def _has_limit_by_default(shape: QueueShape) -> bool:
    major = shape.broker_version.partition(".")[0]
    is_quorum = shape.arguments.get("x-queue-type") == "quorum"
    return is_quorum and major.isdecimal() and int(major) >= QUORUM_LIMIT_SINCE
