"""Decides how a claimed row goes back to pending: when it is due again, and what counts against it.

The table stands in `settlement`. Each function returns a `Release`; nothing is changed here.
"""

import random
from datetime import timedelta

import structlog

from retry_scheduler.backoff import BackoffPolicy, delay_before_republish
from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.messages import ClaimedQuarantine, ClaimedRetry, log_fields
from retry_scheduler.observability import events
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.publisher import Publisher
from retry_scheduler.repository import Release
from retry_scheduler.suspicion import ALONE_AFTER, WITHOUT_PAYLOAD_AFTER, travels_alone

log = structlog.get_logger()

Claimed = ClaimedRetry | ClaimedQuarantine

# Perhaps delivered, perhaps not.
_LOST = (Outcome.UNKNOWN, Outcome.OVERDUE, Outcome.SUSPECT)

# An unknown publication waits until the connection is back; at random, so that a thousand of them
# do not come back together.
UNKNOWN_DELAY = timedelta(seconds=1)

# What has to travel alone goes one after the other, about ten a second.
ALONE_DELAY = timedelta(seconds=1)

# What cannot be encoded travels no better alone, but people are told only after as many tries.
UNSENDABLE_DELAY = timedelta(seconds=1)

# What is too large even without its payload is tried so often.
TOO_LARGE_DELAY = timedelta(seconds=1)

# After a bug, or without its payload: seldom enough not to fill the log.
FAILED_DELAY = timedelta(seconds=5)


def unsent(task: Claimed) -> Release:
    """It was not published, and is due as before."""
    return _uncounted(task)


def queued_up(task: Claimed) -> Release:
    """It has to wait for its turn to travel alone."""
    return _uncounted(task, delay=ALONE_DELAY * (1 + random.random()))


def without_payload(task: Claimed) -> Release:
    """PostgreSQL did not deliver its payload in time, which is nothing against the message."""
    return _uncounted(task, delay=FAILED_DELAY * (1 + random.random()))


def after_failure(task: Claimed) -> Release:
    """Our code failed on it."""
    return Release(task.id, task.claims, delay=FAILED_DELAY, unsettled=task.claims_unsettled)


class Releases:
    """What follows from an outcome other than confirmed. Counts it and logs it, too."""

    def __init__(
        self, publisher: Publisher, metrics: Metrics, *, policy: BackoffPolicy, max_publish_failures: int
    ) -> None:
        self._publisher = publisher
        self._metrics = metrics
        self._policy = policy
        self._max_publish_failures = max_publish_failures

    def after(self, task: Claimed, reason: str | None, outcome: Outcome) -> Release:
        """Return how `task` goes back. reason: why it was on its way to people, None if it was not."""
        if outcome is Outcome.NOT_SENT:
            return unsent(task)
        roll = random.random()
        if outcome is Outcome.HELD:
            return _uncounted(task, error=outcome.value, delay=self._publisher.hold(task, reason))
        if outcome in _LOST:
            event, delay, unsettled = self._after_losing(task, reason, outcome, UNKNOWN_DELAY * (1 + roll))
            self._metrics.unknown()
            log.warning(event, **fields(task), review_reason=reason)
            return Release(task.id, task.claims, error=outcome.value, delay=delay, unsettled=unsettled)
        if outcome is Outcome.TOO_LARGE:
            return self._after_refusing_its_size(task, reason, TOO_LARGE_DELAY * (1 + roll))
        if outcome is Outcome.UNSENDABLE:
            return self._after_failing_to_send(task, reason, UNSENDABLE_DELAY * (1 + roll))
        failures = task.publish_failures + 1
        delay = delay_before_republish(failures, self._policy, roll)
        if reason is None and isinstance(task, ClaimedRetry):
            self._metrics.executed(task.original_queue, success=False)
            if failures >= self._max_publish_failures:
                delay = timedelta(0)  # the next stop is manual review: waiting helps nobody
        log.warning(
            events.RETRY_NOT_DELIVERED,
            **fields(task),
            outcome=outcome.value,
            review_reason=reason,
            publish_failures=failures,
        )
        return Release(task.id, task.claims, failures=1, error=outcome.value, delay=delay)

    def _after_refusing_its_size(self, task: Claimed, reason: str | None, delay: timedelta) -> Release:
        # What the broker has said before may hold no more: only by travelling alone this one is convicted.
        # A body for people holds the payload as base64, which is larger still.
        convicted = travels_alone(task.claims_unsettled)
        if convicted and reason is None and isinstance(task, ClaimedRetry):
            self._metrics.executed(task.original_queue, success=False)
        outcome = Outcome.TOO_LARGE.value
        log.warning(events.RETRY_NOT_DELIVERED, **fields(task), outcome=outcome, review_reason=reason)
        unsettled = max(task.claims_unsettled, WITHOUT_PAYLOAD_AFTER) if convicted else ALONE_AFTER
        return Release(task.id, task.claims, error=outcome, delay=delay, unsettled=unsettled)

    def _after_failing_to_send(self, task: Claimed, reason: str | None, delay: timedelta) -> Release:
        if reason is None and isinstance(task, ClaimedRetry):
            self._metrics.executed(task.original_queue, success=False)
        outcome = Outcome.UNSENDABLE.value
        log.warning(events.RETRY_NOT_DELIVERED, **fields(task), outcome=outcome, review_reason=reason)
        unsettled = max(task.claims_unsettled, ALONE_AFTER)
        return Release(task.id, task.claims, error=outcome, delay=delay, unsettled=unsettled)

    def _after_losing(
        self, task: Claimed, reason: str | None, outcome: Outcome, usual: timedelta
    ) -> tuple[str, timedelta, int]:
        """Return what to log, how long to wait, and what remains of the evidence against the row."""
        if outcome is Outcome.OVERDUE:
            return events.RETRY_UNKNOWN, self._publisher.hold(task, reason), 0
        if outcome is Outcome.UNKNOWN:
            suspected = task.claims_unsettled - 1 if travels_alone(task.claims_unsettled) else 0
            return events.RETRY_UNKNOWN, usual, suspected
        return events.RETRY_SUSPECT, usual, max(task.claims_unsettled, ALONE_AFTER)


def fields(task: Claimed) -> dict[str, object]:
    """Return what every log line about `task` says."""
    if isinstance(task, ClaimedQuarantine):
        return {"quarantine_id": task.id, "field": task.field}
    return log_fields(task)


def _uncounted(task: Claimed, *, error: str | None = None, delay: timedelta | None = None) -> Release:
    # This claim has told nothing about the row: what was known before it remains.
    return Release(task.id, task.claims, error=error, delay=delay, unsettled=task.claims_unsettled - 1)
