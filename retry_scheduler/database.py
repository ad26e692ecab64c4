"""Speaks to PostgreSQL: one pool, a deadline on every call, and errors sorted by what to do about them.

Keeps out of what the statements mean: that is `repository`. No asyncpg exception leaves this module.
"""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from retry_scheduler.errors import DataRefused, StatementRefused, Unavailable
from retry_scheduler.sql import query
from retry_scheduler.tls import client_context, describe_tls_problem
from retry_scheduler.transfer import transfer_s

SERVER = "PostgreSQL"

# A statement of ours takes milliseconds. Longer on the server than by the client's deadline would
# leave statements running that nobody waits for.
STATEMENT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = STATEMENT_TIMEOUT_S + 1.0
ACQUIRE_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 5.0
# /health promises an answer within 2 s, whatever hangs.
PROBE_TIMEOUT_S = 1.5

READ_ONLY = "takes no writes: it is a standby or set to read only"

SESSION = {
    "application_name": "retry-scheduler",
    "statement_timeout": f"{STATEMENT_TIMEOUT_S:.0f}s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "10s",
    # While the server sends, no other time limit ends a statement: a claim of some megabytes on a link
    # that takes nothing would keep its rows locked, away from the other instances.
    "tcp_user_timeout": "3s",
    # An acknowledged message must survive a crash, whatever the server's default is.
    "synchronous_commit": "on",
    # Under a stricter one, instances that want the same rows would fail over each other's.
    "default_transaction_isolation": "read committed",
    "timezone": "UTC",
    # Our statements are short; compiling them costs more than running them.
    "jit": "off",
    # Every statement of ours has its index. On a young table, whose statistics know nothing yet, the
    # planner would read all of it, once for each row that is settled.
    "enable_seqscan": "off",
}


@dataclass(frozen=True, slots=True)
class DatabaseAddress:
    """Where PostgreSQL is and how to log in. `tls` means encrypted and verified, or not at all."""

    host: str
    port: int
    database: str
    user: str
    password: str | None = field(repr=False)
    tls: bool


class _Connection(asyncpg.Connection):
    """Skips the reset at release, a round trip for each statement: we never change a session's state.

    opened_at_s: monotonic time.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.opened_at_s = time.monotonic()

    def get_reset_query(self) -> str:
        return ""


class _ReadOnly(Unavailable):
    """This connection's server takes no writes."""


class Database:
    """A pool of connections. `open` may be called again after `Unavailable`; `close` may be called twice."""

    def __init__(self, address: DatabaseAddress, *, pool_min: int, pool_max: int) -> None:
        self._address = address
        self._pool_min = pool_min
        self._pool_max = pool_max
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._connections: WeakSet[_Connection] = WeakSet()
        self._probing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect POSTGRES_POOL_MIN times. Raises Unavailable if the server is away or refuses the login."""
        with _sorted_errors():
            async with asyncio.timeout(2 * CONNECT_TIMEOUT_S):
                self._pool = await asyncpg.create_pool(
                    **self._connect_arguments(),
                    min_size=self._pool_min,
                    max_size=self._pool_max,
                    connection_class=_Connection,
                    init=self._note_connection,
                )
        self._pool.set_connect_args(**self._connect_arguments())  # they may have changed meanwhile

    def connect_from_now_on_to(self, address: DatabaseAddress) -> None:
        """Make every further connection with `address`. Those that are open go on."""
        self._address = address
        if self._pool is not None:
            self._pool.set_connect_args(**self._connect_arguments())

    async def close(self) -> None:
        """Close every connection; cut those that do not end within two seconds."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait((self._probing,))
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(2):
                await pool.close()
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            pool.terminate()

    async def fetch(self, name: str, *arguments: Any, moved_bytes: int = 0) -> list[asyncpg.Record]:
        """Run the statement `name` of sql/ and return its rows.

        moved_bytes: in the arguments or the rows; what is large may take longer.
        Raises Unavailable (wait and repeat), DataRefused if it is over a value.
        """
        more_s = int(transfer_s(moved_bytes))  # less than a second is in the usual deadline
        with _sorted_errors():
            async with self._connection(
                acquire_s=ACQUIRE_TIMEOUT_S, use_s=CALL_TIMEOUT_S + more_s
            ) as connection:
                if more_s:
                    return await _fetch_slowly(connection, name, arguments, STATEMENT_TIMEOUT_S + more_s)
                return await connection.fetch(query(name), *arguments)

    async def _note_connection(self, connection: Any) -> None:
        self._connections.add(connection)

    def _cut_opened_before(self, moment_s: float) -> None:
        """Cut the connections that are as old as one which has fallen silent.

        They go the same way, and a firewall may have forgotten all of them at once: lent one after the
        other, each would take as long to find out.
        """
        for connection in list(self._connections):
            if connection.opened_at_s < moment_s:
                connection.terminate()

    async def probe(self) -> None:
        """Return if the server takes our writes now and our role may do its work.

        Raises Unavailable within PROBE_TIMEOUT_S. Those who ask while an answer is outstanding share
        it: many who ask about a slow server must not take its connections from the work.
        """
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe(), name="probe")
            self._probing.add_done_callback(lambda probing: probing.cancelled() or probing.exception())
        await asyncio.shield(self._probing)

    async def _probe(self) -> None:
        with _sorted_errors():
            async with (
                asyncio.timeout(PROBE_TIMEOUT_S),
                self._connection(acquire_s=PROBE_TIMEOUT_S, use_s=PROBE_TIMEOUT_S) as connection,
            ):
                (state,) = await connection.fetch(query("server_state"))
                if not state["writable"]:
                    raise _ReadOnly(SERVER, READ_ONLY)
                if state["lacking"]:
                    raise Unavailable(SERVER, f"lacks {', '.join(state['lacking'])}")

    @asynccontextmanager
    async def _connection(
        self, *, acquire_s: float, use_s: float
    ) -> AsyncIterator["PoolConnectionProxy[asyncpg.Record]"]:
        """Lend a connection of the pool; cut it if it does not answer in time."""
        pool = self._pool
        if pool is None:
            raise Unavailable(SERVER, "not connected yet")
        connection = await pool.acquire(timeout=acquire_s)
        lent_at_s = time.monotonic()
        try:
            async with asyncio.timeout(use_s):
                yield connection
        except _MUST_NOT_BE_LENT_AGAIN as error:
            connection.terminate()
            # Only a server that is there ends a slow statement in time.
            if isinstance(error, TimeoutError) and use_s > STATEMENT_TIMEOUT_S:
                self._cut_opened_before(lent_at_s)
            raise
        finally:
            await pool.release(connection)

    @asynccontextmanager
    async def session(
        self, *, within_s: float | None = None, settings: Mapping[str, str] = SESSION
    ) -> AsyncIterator[asyncpg.Connection]:
        """Lend one connection of its own outside the pool, for migrations, checks and maintenance.

        within_s: for connecting and all that is done with it; a link may fall silent at any moment.
        settings: of the session, instead of SESSION.
        An open transaction is rolled back by the end of the session.
        Raises Unavailable.
        """
        with _sorted_errors():
            async with asyncio.timeout(within_s):
                connection = await asyncpg.connect(
                    **self._connect_arguments() | {"server_settings": dict(settings)}
                )
                try:
                    yield connection
                finally:
                    connection.terminate()

    def _connect_arguments(self) -> dict[str, Any]:
        address = self._address
        return {
            "host": address.host,
            "port": address.port,
            "database": address.database,
            "user": address.user,
            "password": address.password,
            # asyncpg's own default, "prefer", would fall back to plain text without a word.
            "ssl": client_context() if address.tls else False,
            "timeout": CONNECT_TIMEOUT_S,
            "server_settings": SESSION,
        }


async def _fetch_slowly(
    connection: "PoolConnectionProxy[asyncpg.Record]", name: str, arguments: Sequence[Any], within_s: float
) -> list[asyncpg.Record]:
    # While its arguments are on their way, the session is idle in the transaction.
    await connection.execute("BEGIN")
    try:
        await connection.fetch(query("allow_more_time"), f"{within_s:.0f}s")
        rows = await connection.fetch(query(name), *arguments)
    except BaseException:
        connection.terminate()  # and the transaction with it
        raise
    await connection.execute("COMMIT")
    return rows


# A connection that did not answer in time: giving it back would wait until the server has cancelled
# the statement, and a frozen server never does. One whose state the driver has lost. One that is
# read only: after a failover it leads to the former primary, and only a new one leads to the new.
_MUST_NOT_BE_LENT_AGAIN = (
    TimeoutError,
    asyncio.CancelledError,
    asyncpg.InternalClientError,
    asyncpg.ReadOnlySQLTransactionError,
    _ReadOnly,
)

# SQLSTATE classes: syntax error or access rule violation, invalid schema name, feature not supported.
_STATEMENT_REFUSED = ("42", "3F", "0A")


@contextmanager
def _sorted_errors() -> Iterator[None]:
    """Turn whatever the driver raises into the one of our errors that says what to do."""
    try:
        yield
    except asyncpg.PostgresError as error:
        sqlstate = error.sqlstate or "unknown"
        # Other violations (a unique key, a foreign trigger) are the table's trouble, not the message's.
        if sqlstate[:2] == "22" or sqlstate == "23514":
            raise DataRefused(_first_line(error), sqlstate=sqlstate, detail=error.detail or "") from error
        problem = f"{_first_line(error)} (SQLSTATE {sqlstate})"
        if sqlstate[:2] in _STATEMENT_REFUSED:
            raise StatementRefused(SERVER, problem, sqlstate=sqlstate) from error
        raise Unavailable(SERVER, problem) from error
    except asyncpg.InterfaceError as error:
        if isinstance(error, ValueError):  # a value that the driver cannot encode
            raise DataRefused(_first_line(error), sqlstate="client") from error
        raise Unavailable(SERVER, _first_line(error)) from error
    except asyncpg.InternalClientError as error:
        # Raised when the server's farewell (57P01) arrives while a statement is being sent.
        raise Unavailable(SERVER, f"connection lost: {_first_line(error)}") from error
    except TimeoutError as error:
        raise Unavailable(SERVER, "no answer in time") from error
    except ssl.SSLError as error:
        raise Unavailable(SERVER, describe_tls_problem(error)) from error
    except OSError as error:
        raise Unavailable(SERVER, error.strerror or str(error) or type(error).__name__) from error


def _first_line(error: BaseException) -> str:
    # Later lines may hold the row's values, which do not belong in a log.
    lines: Sequence[str] = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
