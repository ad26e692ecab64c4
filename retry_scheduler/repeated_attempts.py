"""Decides what becomes of a request whose attempt is stored already.

What a repeated attempt means (docs/contract.md, "Asking for a retry"):

    redelivered by the broker                          nothing changes
    a new message, and the attempt is still pending    nothing changes: it is sent yet
    the same, but our connection has ended, and it     nothing changes: it came from this very message,
    was stored after we received the message, or       which the broker has given to another instance
    from a redelivered one while ours was on its way
    a new message, and the attempt has been executed,  the upstream does not count: it becomes the
    or is just being sent, or its confirm is overdue   next attempt, highest retry_count + 1

A consumer may fail before we have noted that its message was confirmed: that attempt is pending in the table
still, and will not be sent again.

Of several in one batch each becomes one more: their numbers are given at once, and stored in one statement.
"""

import time
from collections.abc import Collection, Sequence

import structlog

from retry_scheduler.broker.connection import HEARTBEAT_S, Connection
from retry_scheduler.broker.intake_link import Delivery
from retry_scheduler.errors import MalformedRequest, Unavailable
from retry_scheduler.messages import RetryRequest, log_fields
from retry_scheduler.observability import events
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.repository import Repository

log = structlog.get_logger()

RETRY_COUNT_MAX = 2**31 - 1

# So long a message may have been on its way to us; on a link that holds it longer the heartbeats fail.
LONGEST_WAY_S = 3 * HEARTBEAT_S


class Candidate:
    """A request on its way into the table. told: the attempt as the upstream counted it."""

    __slots__ = ("delivery", "request", "told")

    def __init__(self, request: RetryRequest, delivery: Delivery) -> None:
        self.request = request
        self.delivery = delivery
        self.told = request.attempt


Refusals = dict[Candidate, MalformedRequest]


class RepeatedAttempts:
    """The rules above."""

    def __init__(self, repository: Repository, metrics: Metrics) -> None:
        self._repository = repository
        self._metrics = metrics

    async def onward(self, repeated: Sequence[Candidate]) -> tuple[list[Candidate], Refusals]:
        """Return what must be stored as a next attempt, and what has no next; the rest is done with.

        Raises Unavailable.
        """
        if not repeated:
            return [], {}
        states = await self._repository.attempt_states(list({candidate.told for candidate in repeated}))
        answered_s = time.monotonic()

        def perhaps_from_it(candidate: Candidate) -> bool:
            state = states.get(candidate.told)
            if state is None:
                return False
            way_s = LONGEST_WAY_S if state.redelivered else 0.0
            return answered_s - state.age_s > candidate.delivery.received_s - way_s

        # While a connection answers, nobody else was given what it has delivered: that is another message.
        ended = await _ended({c.delivery.connection for c in repeated if perhaps_from_it(c)})
        highest: dict[str, int] = {}  # by message, the given numbers included: each repetition has its own
        onward: list[Candidate] = []
        at_the_end: Refusals = {}
        for candidate in repeated:
            message_id, told = candidate.told
            state = states.get(candidate.told)
            if state is None:  # archived or deleted a moment ago: then it is new after all
                candidate.request.retry_count = told
                onward.append(candidate)
            elif (
                candidate.delivery.redelivered
                or (state.status == "pending" and not state.may_have_arrived)
                or (candidate.delivery.connection in ended and perhaps_from_it(candidate))
            ):
                candidate.delivery.done = True
                self._metrics.duplicate("ignored")
                log.info(
                    events.DUPLICATE_IGNORED,
                    **log_fields(candidate.request),
                    status=state.status,
                    redelivered=candidate.delivery.redelivered,
                )
            elif (number := highest.get(message_id, state.highest) + 1) > RETRY_COUNT_MAX:
                problem = MalformedRequest("retry_count", "repeats the highest attempt that can be counted")
                at_the_end[candidate] = problem
            else:
                # Another instance may take the same number first: then this is asked again from the start.
                highest[message_id] = candidate.request.retry_count = number
                onward.append(candidate)
        return onward, at_the_end


async def _ended(connections: Collection[Connection]) -> set[Connection]:
    """Return those that have ended: what they have delivered may have been given to others.

    Raises Unavailable if one neither answers nor has ended yet.
    """
    ended = set()
    for connection in connections:
        try:
            await connection.round_trip()
        except Unavailable:
            if not connection.closed.done():
                raise
            ended.add(connection)
    return ended
