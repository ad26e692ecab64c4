"""Publishes batches, mandatory and confirmed, learns what became of each message, and reconnects by itself.

    connecting -> ready -> proven (a first confirm)       `changed` wakes whoever waits for a new state
         ^          `--<-> blocked (a broker alarm)
         `-- connection or channel lost: outstanding publications become unknown

Outcomes are handed on in waves, as they come: one queue that does not confirm must not keep the
others' messages from being settled. When a confirm is overdue and the broker answers nothing else
either, not even a question, the connection is dropped, and never used again. If it answers, only the
overdue ones are given up, and their queues' circuits open (`breaker`). A blocked broker is no reason
for either: it confirms when the alarm is over.

A broker with an alarm says so only after something was published. Callers send one message through
a connection that is not proven, so that an alarm does not swallow a batch at each reconnect.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from pika.exceptions import AMQPError

from retry_scheduler.broker.circuits import Circuits
from retry_scheduler.broker.confirms import ConfirmBatch, ConfirmLedger, Outcome
from retry_scheduler.broker.connection import SERVER, Connection, keep_linked
from retry_scheduler.broker.properties import text_headers
from retry_scheduler.broker.publication import RETRY_ID, Publication
from retry_scheduler.broker.size_limit import SizeLimit
from retry_scheduler.broker.topology import connect_with_queues
from retry_scheduler.broker.waves import wave_complete
from retry_scheduler.errors import ContentRefused, Unavailable
from retry_scheduler.transfer import LARGE_BYTES, transfer_s

# Confirms take milliseconds, on slow disks a few hundred. Much shorter and a busy broker gets
# duplicates; much longer and a lost confirm delays its message.
CONFIRM_TIMEOUT_S = 10.0

# After so long, the broker is asked whether it answers at all. If so, the queue is slow.
SLOW_AFTER_S = 1.0
ASK_EVERY_S = 0.5

# So many messages are written before the event loop gets its turn again.
_WRITE_RUN = 64


class PublishLink:
    """One publishing channel."""

    def __init__(
        self,
        url: str,
        *,
        queues: Sequence[str],
        name: str,
        on_problem: Callable[[Unavailable], None],
        size_limit: SizeLimit | None = None,
    ) -> None:
        """Queues to create where they are missing, and whom to tell of each failed try."""
        self.size_limit = size_limit or SizeLimit()
        self._url = url
        self._queues = queues
        self._name = name
        self._on_problem = on_problem
        self._connection: Connection | None = None
        self._ledger = ConfirmLedger()
        self._blocked = False
        self._unblocked_at_s = 0.0
        self._proven = False
        self._large_bytes = 0  # outstanding
        self._slow: dict[ConfirmBatch, int] = {}  # outstanding for long, at queues that are slow
        self._heard_at_s = 0.0
        self._asked_at_s: float | None = None  # since then a question has not been answered
        self._asking: asyncio.Task[None] | None = None
        self._circuits = Circuits()
        self.changed = asyncio.Event()

    @property
    def up(self) -> bool:
        """Whether there is a connection, blocked or not."""
        return self._connection is not None

    @property
    def blocked(self) -> bool:
        """Whether the broker has an alarm and takes no messages."""
        return self._blocked

    @property
    def ready(self) -> bool:
        """Whether publishing makes sense now."""
        return self.up and not self._blocked

    @property
    def proven(self) -> bool:
        """Whether this connection has confirmed something: then it can be trusted with a batch."""
        return self.ready and self._proven

    @property
    def at_rest(self) -> bool:
        """Whether it is ready, nothing is outstanding, and no queue is known to be slow."""
        return self.ready and not self._ledger and self._circuits.idle

    @property
    def slow(self) -> int:
        """How many publications wait for queues that are slow, while the broker answers."""
        return sum(self._slow.values())

    def hold_s(self, queue: str) -> float:
        """Return for how many seconds to hold one more message for a queue that does not confirm."""
        return self._circuits.hold_s(queue)

    def connect_from_now_on_to(self, url: str) -> None:
        """Make every further connection with `url`. The one that is open goes on."""
        self._url = url

    def another(self, name: str) -> "PublishLink":
        """Return a link to the same broker with a connection of its own, which the broker lists as `name`."""
        return PublishLink(
            self._url,
            queues=self._queues,
            name=name,
            on_problem=self._on_problem,
            size_limit=self.size_limit,
        )

    async def run(self) -> None:
        """Stay connected until cancelled."""
        await keep_linked(self._session, on_problem=self._on_problem)

    async def wait_until_ready(self, seconds: float) -> None:
        """Return when publishing makes sense, or after `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.ready:
                    self.changed.clear()
                    await self.changed.wait()

    async def publish(self, publications: Sequence[Publication]) -> list[Outcome]:
        """Send all, wait for the broker's answers, and return the outcomes in order. Never raises."""
        outcomes = [Outcome.UNKNOWN] * len(publications)
        async for wave in self.waves(publications):
            for place, outcome in wave:
                outcomes[place] = outcome
        return outcomes

    async def waves(
        self, publications: Sequence[Publication], may_go_on: Callable[[], bool] = lambda: True
    ) -> AsyncIterator[list[tuple[int, Outcome]]]:
        """Send all, and yield (place, outcome) of each as the broker answers, several at a time.

        may_go_on: asked before each few; what is left when it says no is not sent.
        Usually one wave. Ends within about CONFIRM_TIMEOUT_S, or that long after an alarm is over.
        Never raises: trouble is an outcome.
        """
        batch = ConfirmBatch(len(publications))
        large_bytes = sum(len(each.body) for each in publications if len(each.body) > LARGE_BYTES)
        self._large_bytes += large_bytes
        try:
            async for wave in self._waves(batch, publications, may_go_on):
                yield wave
        finally:
            self._large_bytes -= large_bytes
            self._slow.pop(batch, None)

    async def _waves(
        self, batch: ConfirmBatch, publications: Sequence[Publication], may_go_on: Callable[[], bool]
    ) -> AsyncIterator[list[tuple[int, Outcome]]]:
        connection = self._connection
        await self._write(batch, publications, may_go_on)
        began_s = time.monotonic()
        while True:
            await wave_complete(batch)
            # Asked before taking: what comes while the caller works on a wave must come out, too.
            finished = batch.done.is_set()
            wave = batch.take_new()
            if wave:
                yield wave
            if finished:
                return
            now_s = time.monotonic()
            if connection is None or now_s - began_s < SLOW_AFTER_S:
                continue
            silent_s = now_s - self._heard_at_s
            if silent_s > ASK_EVERY_S:
                self._ask(connection)
            waiting = [publications[place] for place in batch.open_places()]
            patience_s = CONFIRM_TIMEOUT_S + transfer_s(self._large_bytes)
            if now_s - began_s > patience_s and not self._alarm_within(CONFIRM_TIMEOUT_S):
                answers = connection is self._connection and silent_s < CONFIRM_TIMEOUT_S / 2
                if not answers and not self._gave_no_answer(connection, now_s):
                    continue  # nobody has asked: settling the wave before took long
                self._circuits.give_up(waiting, overdue=answers)
                if not answers:
                    connection.cut("confirms did not come in time")
                batch.settle_rest(Outcome.OVERDUE if answers else Outcome.UNKNOWN)
            elif silent_s < 2 * ASK_EVERY_S and connection is self._connection:
                self._circuits.slow(waiting)
                self._slow[batch] = len(waiting)
                self.changed.set()

    async def _write(
        self, batch: ConfirmBatch, publications: Sequence[Publication], may_go_on: Callable[[], bool]
    ) -> None:
        connection, ledger = self._connection, self._ledger
        for first in range(0, len(publications), _WRITE_RUN):
            run = range(first, min(first + _WRITE_RUN, len(publications)))
            if connection is None or connection.closed.done() or self._blocked or not may_go_on():
                for place in run:
                    batch.settle(place, Outcome.NOT_SENT)
                continue
            with connection.together():
                for place in run:
                    known = None if self._circuits.idle else self._circuits.admit(publications[place])
                    if known is None:
                        self._send(connection, ledger, batch, place, publications[place])
                    else:
                        batch.settle(place, known)
            # Whatever gets its turn now may take seconds, or the process may be frozen.
            await asyncio.sleep(0)

    async def round_trip(self) -> None:
        """Return once the broker has handled all that was sent before. Raises Unavailable."""
        if self._connection is None:
            raise Unavailable(SERVER, "not connected")
        await self._connection.round_trip()

    async def restore_queues(self) -> None:
        """Create our queues where they are missing, without touching this link. Raises Unavailable."""
        connection = await connect_with_queues(self._url, self._queues, name=f"{self._name} (queues)")
        await connection.close()

    def _send(
        self,
        connection: Connection,
        ledger: ConfirmLedger,
        batch: ConfirmBatch,
        place: int,
        publication: Publication,
    ) -> None:
        try:
            connection.publish(publication.queue, publication.properties, publication.body)
        except ValueError:  # it could not be encoded; nothing was written
            batch.settle(place, Outcome.UNSENDABLE)
        except AMQPError:  # the channel has closed; nothing was written
            batch.settle(place, Outcome.NOT_SENT)
        else:
            # The broker counts what it receives: a number is only taken for what was written.
            ledger.sent(batch, place, publication.key, len(publication.body))

    async def _session(self) -> None:
        connection = await connect_with_queues(self._url, self._queues, name=self._name)
        ledger = ConfirmLedger()
        try:
            connection.on_blocked = self._note_blocked
            connection.channel.add_on_return_callback(
                lambda _, method, properties, body: ledger.returned(
                    text_headers(properties.raw, (RETRY_ID,)).get(RETRY_ID)
                )
            )
            await connection.call(
                connection.channel.confirm_delivery, lambda frame: self._answer(ledger, frame.method)
            )
            self._note_heard()
            self._connection, self._ledger = connection, ledger
            self._circuits.connected(ledger)
            self._blocked = self._proven = False
            self.changed.set()
            reason = await asyncio.shield(connection.closed)
            raise (ContentRefused if connection.closed_over_content else Unavailable)(SERVER, reason)
        finally:
            self._connection = None
            self._settle_outstanding(connection, ledger)
            self._blocked = self._proven = False
            self.changed.set()
            await connection.close()

    def _settle_outstanding(self, connection: Connection, ledger: ConfirmLedger) -> None:
        if connection.closed_over_content:
            limit_bytes = self.size_limit.learn(connection.closed.result())
            if limit_bytes is None:
                ledger.close(Outcome.SUSPECT)
            else:
                ledger.close_over_size(limit_bytes)
        # We may not publish. Of several messages some may have been taken before the right was withdrawn;
        # the only one that this connection has ever sent is certainly the one that was refused.
        elif connection.closed_over_rights and not self._proven and len(ledger) == 1:
            ledger.close(Outcome.NOT_SENT)
        else:
            ledger.close()

    def _note_blocked(self, blocked: bool) -> None:
        self._blocked = blocked
        self._unblocked_at_s = time.monotonic()
        self.changed.set()

    def _gave_no_answer(self, connection: Connection, now_s: float) -> bool:
        """Whether the connection is gone, or has not answered a question for long."""
        if connection is not self._connection:
            return True
        return self._asked_at_s is not None and now_s - self._asked_at_s >= CONFIRM_TIMEOUT_S / 2

    def _ask(self, connection: Connection) -> None:
        """Find out whether the broker still answers, although it confirms nothing; nobody waits for that."""
        if connection is not self._connection:
            return
        if self._asked_at_s is None:
            self._asked_at_s = time.monotonic()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._hear(connection), name="ask the broker")

    async def _hear(self, connection: Connection) -> None:
        with suppress(Unavailable):
            await connection.round_trip()
            if connection is self._connection:
                self._note_heard()
                # An alarm would have stopped the question behind what was published before it.
                self._proven = True

    def _note_heard(self) -> None:
        self._heard_at_s = time.monotonic()
        self._asked_at_s = None

    def _alarm_within(self, seconds: float) -> bool:
        return self._blocked or time.monotonic() - self._unblocked_at_s < seconds

    def _answer(self, ledger: ConfirmLedger, method: Any) -> None:
        self._proven = True
        self._note_heard()
        ledger.answered(method.delivery_tag, multiple=method.multiple, accepted=method.NAME == "Basic.Ack")
