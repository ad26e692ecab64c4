"""The circuits of one publish link: the breaker with a clock, the ledger's answers, and a log.

The breaker is told of answers only while it is interested in any: usually no circuit is open, and then a
confirm costs nothing here.
"""

import random
import time
from collections.abc import Sequence

import structlog

from retry_scheduler.broker.breaker import Breaker
from retry_scheduler.broker.confirms import ConfirmLedger, Outcome
from retry_scheduler.broker.publication import Publication
from retry_scheduler.observability import events

log = structlog.get_logger()


class Circuits:
    """Outlives the link's connections."""

    def __init__(self) -> None:
        self._breaker = Breaker()
        self._ledger = ConfirmLedger()

    @property
    def idle(self) -> bool:
        """Whether every message may be sent, and no answer is of interest."""
        return self._breaker.idle

    def hold_s(self, queue: str) -> float:
        """Return for how many seconds to hold one more message for `queue`."""
        return self._breaker.hold_s(queue, time.monotonic(), random.random())

    def connected(self, ledger: ConfirmLedger) -> None:
        """Begin anew on another connection, whose publications `ledger` knows."""
        self._ledger = ledger
        self._breaker.connected(time.monotonic())
        self._listen()

    def admit(self, publication: Publication) -> Outcome | None:
        """Return None if it may be sent, otherwise what is known of it without sending."""
        known = self._breaker.admit(publication.key, publication.claim, publication.queue, time.monotonic())
        self._listen()
        return known

    def slow(self, publications: Sequence[Publication]) -> None:
        """Open the circuits of what is outstanding for long, and is still waited for."""
        now_s = time.monotonic()
        for each in publications:
            self._breaker.slow(each.key, each.queue, now_s)
        self._listen()

    def give_up(self, publications: Sequence[Publication], *, overdue: bool) -> None:
        """Open the circuits of the queues that have not confirmed. overdue: their answers may come yet."""
        now_s = time.monotonic()
        for each in publications:
            if overdue:
                opened = self._breaker.overdue(each.key, each.claim, each.queue, now_s)
            else:
                opened = self._breaker.suspect(each.queue, now_s)
            if opened:
                log.warning(events.QUEUE_HANGS, queue=each.queue)
        self._listen()

    def _listen(self) -> None:
        self._ledger.on_answer = None if self._breaker.idle else self._note_answer

    def _note_answer(self, key: str, outcome: Outcome) -> None:
        queue = self._breaker.answered(key, outcome, time.monotonic())
        if queue is not None:
            log.info(events.QUEUE_CONFIRMS, queue=queue)
        self._listen()
