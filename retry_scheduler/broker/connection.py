"""Opens one AMQP connection with one channel, and keeps a link to the broker for as long as it is wanted.

Reconnecting means starting over: everything is torn down, connected, declared and verified again.
No pika exception leaves this package.
"""

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import pika
import structlog
from pika.exceptions import AMQPError, ChannelWrongStateError, IncompatibleProtocolError, StreamLostError

import retry_scheduler.broker.properties  # noqa: F401  enters the raw properties in pika's registry
from retry_scheduler.broker.wire import WireConnection
from retry_scheduler.errors import ContentRefused, Unavailable
from retry_scheduler.observability import events
from retry_scheduler.tls import client_context, describe_tls_problem

log = structlog.get_logger()

SERVER = "RabbitMQ"

HEARTBEAT_S = 10
CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0

# With full jitter, so that many clients do not come back in step. Longer than 3 s would show in
# the time to recover; shorter than 0.2 s would be a hot loop.
FIRST_BACKOFF_S = 0.2
LAST_BACKOFF_S = 3.0

# Reply codes with which a broker answers a message it cannot take: precondition failed (too large, a
# property it refuses), frame error, syntax error, unexpected frame, internal error (the channel's
# process died on it). Others tell of the broker's or an operator's doings.
_CONTENT_FAULTS = (406, 501, 502, 505, 541)
_ACCESS_REFUSED = 403


class Connection:
    """One open connection with one open channel. Made by `connect`; of no use once `closed` is done.

    closed: done with the reason. closed_over_content: the broker ended it over something that was sent.
    closed_over_rights: it ended it because our user may not do what was asked.
    """

    def __init__(self, raw: WireConnection, channel: Any) -> None:
        self._raw = raw
        self.together = raw.together
        self.channel = channel
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.on_blocked: Callable[[bool], None] = lambda blocked: None
        self.closed_over_content = self.closed_over_rights = False
        self._gone = asyncio.Event()
        self._asked: asyncio.Future[Any] | None = None  # the question that was sent last
        self._trip: asyncio.Task[None] | None = None  # whose question has not been sent yet
        raw.add_on_close_callback(lambda _, reason: self._note_gone(reason))
        raw.add_on_connection_blocked_callback(lambda *_: self.on_blocked(True))
        raw.add_on_connection_unblocked_callback(lambda *_: self.on_blocked(False))
        channel.add_on_close_callback(lambda _, reason: self._note_closed(reason))

    @property
    def broker_version(self) -> str:
        """What the broker calls its version, such as "3.10.8"; empty if it does not say."""
        version = (self._raw.server_properties or {}).get("version", "")
        return version.decode(errors="replace") if isinstance(version, bytes) else str(version)

    def publish(self, queue: str, properties: bytes, body: bytes) -> None:
        """Send a mandatory message through the default exchange.

        Raises AMQPError if the channel has closed and ValueError if AMQP cannot carry it; in both
        cases nothing was written.
        """
        if not self.channel.is_open:
            raise ChannelWrongStateError("the channel has closed")
        self._raw.publish(self.channel.channel_number, queue, properties, body)

    def deliver_to(self, take: Callable[[int, bool, bytes, bytes], None] | None) -> None:
        """Hand deliveries straight to `take`, see WireConnection.on_delivery; None: all through pika."""
        self._raw.on_delivery = take

    async def call(self, start: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a pika method that answers through `callback=`, and return the answer. Raises Unavailable."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            start(*arguments, callback=_setter(answer), **options)
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await asyncio.wait((answer, self.closed), return_when=asyncio.FIRST_COMPLETED)
        except (AMQPError, TimeoutError) as error:
            raise Unavailable(SERVER, describe(error)) from error
        if not answer.done():
            raise Unavailable(SERVER, self.closed.result())
        return answer.result()

    async def round_trip(self) -> None:
        """Return once the broker has handled all that was sent before. Raises Unavailable.

        pika keeps one callback for the answer. So there is one question at a time, and those who come while
        it is not answered share the next one: the broker may have answered before they asked.
        """
        if self._trip is None or self._trip.done():
            self._trip = asyncio.create_task(self._ask(), name="round trip")
            self._trip.add_done_callback(lambda trip: trip.cancelled() or trip.exception())
        await asyncio.shield(self._trip)

    async def _ask(self) -> None:
        earlier = self._asked
        try:
            if earlier is not None:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await asyncio.wait((earlier, self.closed), return_when=asyncio.FIRST_COMPLETED)
            async with asyncio.timeout(CALL_TIMEOUT_S):
                self._trip = None
                self._asked = answer = asyncio.get_running_loop().create_future()
                self.channel.flow(True, callback=_setter(answer))
                await asyncio.wait((answer, self.closed), return_when=asyncio.FIRST_COMPLETED)
        except (AMQPError, TimeoutError) as error:
            raise Unavailable(SERVER, describe(error)) from error
        if not answer.done():
            raise Unavailable(SERVER, self.closed.result())

    async def close(self) -> None:
        """Close politely, so that the broker handles what was sent before; cut it if that takes too long."""
        if self._raw.is_open:
            self._raw.close()
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._gone.wait()
            except TimeoutError:
                pass
        self.cut("closed by us")

    def cut(self, reason: str) -> None:
        """Drop the socket at once; harmless when repeated."""
        self._note_closed(reason)
        if not self._gone.is_set():
            # pika's public ways to leave all wait for the peer, which may have fallen silent.
            self._raw._terminate_stream(StreamLostError(reason))

    def _note_gone(self, reason: object) -> None:
        self._gone.set()
        self._note_closed(reason)

    def _note_closed(self, reason: object) -> None:
        if not self.closed.done():
            code = getattr(reason, "reply_code", None)
            self.closed_over_content = code in _CONTENT_FAULTS
            self.closed_over_rights = code == _ACCESS_REFUSED
            self.closed.set_result(describe(reason))


async def connect(url: str, *, name: str) -> Connection:
    """Return an open connection with an open channel.

    url: amqp:// or amqps://; with the latter the server's certificate and name are verified.
    name: shown by the broker in its list of connections.
    Raises Unavailable within about CONNECT_TIMEOUT_S; the problem never holds the password.
    """
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[Any] = loop.create_future()

    def finish(result: Any) -> None:
        if not opened.done():
            opened.set_result(result)
        elif isinstance(result, WireConnection) and result.is_open:
            result.close()  # too late: nobody waits for it any more

    # Never aborted: pika 1.4.4 fails an assertion if it is aborted during the handshake. It ends by
    # itself, by its own timeout.
    WireConnection.create_connection([_parameters(url, name)], finish, custom_ioloop=loop)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S + 1):
            raw = await opened
    except TimeoutError as error:
        raise Unavailable(SERVER, "no answer in time while connecting") from error
    if not isinstance(raw, WireConnection):
        raise Unavailable(SERVER, describe(raw))
    raw.read_in_large_pieces()
    return await _with_channel(raw)


async def keep_linked(
    session: Callable[[], Awaitable[None]], *, on_problem: Callable[[Unavailable], None]
) -> None:
    """Run `session` again and again until cancelled.

    session: connects, calls back that it is up, waits for the end, and raises Unavailable.
    on_problem: told of each end; one call a try.
    """
    backoff_s = FIRST_BACKOFF_S
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        try:
            await session()
        except ContentRefused as problem:
            on_problem(problem)
            backoff_s = FIRST_BACKOFF_S
        except Unavailable as problem:
            on_problem(problem)
        except Exception as error:
            # Deaf for ever would be the worst way to meet a bug, ours or pika's: start over, loudly.
            log.exception(events.CONNECTION_FAILED)
            on_problem(Unavailable(SERVER, describe(error)))
        if loop.time() - began > LAST_BACKOFF_S:
            backoff_s = FIRST_BACKOFF_S  # it had worked: try again soon
        await asyncio.sleep(random.uniform(0, backoff_s))
        backoff_s = min(backoff_s * 2, LAST_BACKOFF_S)


def describe(reason: object) -> str:
    """Return one line that says why a connection or channel ended, without any address or secret."""
    if isinstance(reason, str):
        return reason
    causes = getattr(reason, "exceptions", None)
    if causes:
        return describe(causes[-1])
    inner = getattr(reason, "exception", None)
    if isinstance(inner, BaseException):
        return describe(inner)
    if isinstance(reason, IncompatibleProtocolError):
        return (
            "the server ended the connection before AMQP began; for a TLS port the URL begins with amqps://"
        )
    code, text = getattr(reason, "reply_code", None), getattr(reason, "reply_text", None)
    if code is not None:
        return f"{code} {text}"
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    if isinstance(reason, ssl.SSLError):
        return describe_tls_problem(reason)
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    first = next(iter(getattr(reason, "args", ())), None)
    if isinstance(first, BaseException) and first is not reason:
        return describe(first)
    return f"{type(reason).__name__}: {first}" if first else type(reason).__name__


async def _with_channel(raw: WireConnection) -> Connection:
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[Any] = loop.create_future()

    def fail(_: Any, reason: object) -> None:
        if not opened.done():
            opened.set_exception(Unavailable(SERVER, describe(reason)))

    try:
        raw.add_on_close_callback(fail)
        raw.channel(on_open_callback=_setter(opened))
        async with asyncio.timeout(CALL_TIMEOUT_S):
            return Connection(raw, await opened)
    except BaseException as error:
        with suppress(AMQPError):  # it has closed already
            raw.close()
        if isinstance(error, AMQPError | TimeoutError):
            raise Unavailable(SERVER, describe(error)) from error
        raise


def _setter(future: "asyncio.Future[Any]") -> Callable[[Any], None]:
    """Return a callback that ends the wait for `future`, once."""

    def finish(result: Any) -> None:
        if not future.done():
            future.set_result(result)

    return finish


def _credentials(parts: SplitResult) -> pika.PlainCredentials:
    if parts.username is None:  # nobody is named: the user that a broker has from the start
        return pika.PlainCredentials("guest", "guest")
    return pika.PlainCredentials(unquote(parts.username), unquote(parts.password or ""))


def _parameters(url: str, name: str) -> pika.ConnectionParameters:
    parts = urlsplit(url)
    host = parts.hostname or "localhost"
    tls = parts.scheme == "amqps"
    return pika.ConnectionParameters(
        host=host,
        port=parts.port or (5671 if tls else 5672),
        virtual_host=unquote(parts.path[1:]) or "/",
        credentials=_credentials(parts),
        ssl_options=pika.SSLOptions(client_context(), host) if tls else None,
        heartbeat=HEARTBEAT_S,
        # Being blocked is a state of the broker, not a reason to leave it.
        blocked_connection_timeout=None,
        connection_attempts=1,
        socket_timeout=CONNECT_TIMEOUT_S,
        stack_timeout=CONNECT_TIMEOUT_S,
        client_properties={"connection_name": name, "product": "retry-scheduler"},
    )
