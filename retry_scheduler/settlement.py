"""Publishes claimed rows and settles each by what became of it. The row changes only after the confirm.

    claimed --publish--> confirmed            -> retried, or failed if it went to manual review
                         returned or refused  -> back to pending, due again later, one failure more
                         unknown              -> back to pending, due again soon, same x-retry-id
                         suspect              -> the same, and from now on it travels alone; after
                                                 three such journeys it goes to manual review
                         not sent             -> back to pending as it was
                         unsendable           -> manual review, in the same breath

Crash windows: before the publish nothing has happened, and the lease runs out. Between publish and
settlement the message may have been delivered: whoever claims the row next sends it again, and the
consumer knows it by its x-retry-id.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import structlog

from retry_scheduler.agenda import Agenda
from retry_scheduler.backoff import BackoffPolicy, delay_before_republish
from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.errors import Unavailable
from retry_scheduler.messages import ClaimedQuarantine, ClaimedRetry
from retry_scheduler.observability import logs
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.publisher import ALONE_AFTER, UNPUBLISHABLE_AFTER, Publisher
from retry_scheduler.repository import Release, Repository, Settlement

log = structlog.get_logger()

Result = TypeVar("Result")

# An unknown publication waits until the connection is back; at random, so that a thousand of them
# do not come back together.
UNKNOWN_DELAY = timedelta(seconds=1)

# After a bug: seldom enough not to fill the log.
FAILED_DELAY = timedelta(seconds=5)

FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 1.0


class Settler:
    """Takes claimed rows to their end, or back."""

    def __init__(
        self,
        repository: Repository,
        publisher: Publisher,
        agenda: Agenda,
        metrics: Metrics,
        *,
        policy: BackoffPolicy,
        max_publish_failures: int,
    ) -> None:
        self._repository = repository
        self._publisher = publisher
        self._agenda = agenda
        self._metrics = metrics
        self._policy = policy
        self._max_publish_failures = max_publish_failures

    async def deliver(self, tasks: Sequence[ClaimedRetry], claimed_at_s: float) -> None:
        """Publish and settle attempts. claimed_at_s: monotonic time just before they were claimed."""
        reasons = [self._review_reason(task) for task in tasks]
        outcomes = await self._publisher.publish(tasks, reasons)
        unsendable = [place for place, outcome in enumerate(outcomes) if outcome is Outcome.UNSENDABLE]
        if unsendable:
            for place in unsendable:
                reasons[place] = reasons[place] or "unpublishable"
            again = await self._publisher.publish(
                [tasks[p] for p in unsendable], [reasons[p] for p in unsendable]
            )
            for place, outcome in zip(unsendable, again, strict=True):
                outcomes[place] = outcome
        confirmed_at_s = time.monotonic()
        settlements: list[Settlement] = []
        releases: list[Release] = []
        for task, reason, outcome in zip(tasks, reasons, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                status = "retried" if reason is None else "failed"
                settlements.append(Settlement(task.id, task.claims, status, reason))
            else:
                releases.append(self._release(task, reason, outcome))
        if settlements:
            settled = await _until_possible(
                lambda: self._repository.complete(settlements), logs.SETTLE_FAILED
            )
            self._report(
                tasks, reasons, settled, {done.id for done in settlements}, confirmed_at_s - claimed_at_s
            )
        if releases:
            self._agenda.expect(
                await _until_possible(lambda: self._repository.release(releases), logs.SETTLE_FAILED)
            )
        if any(
            outcome is Outcome.RETURNED and reason for outcome, reason in zip(outcomes, reasons, strict=True)
        ):
            await self._restore_queues()

    async def give_back(self, tasks: Sequence[ClaimedRetry]) -> None:
        """Give attempts back that were not published: they are due as before."""
        releases = [Release(task.id, task.claims) for task in tasks]
        self._agenda.expect(
            await _until_possible(lambda: self._repository.release(releases), logs.SETTLE_FAILED)
        )

    async def put_off(self, tasks: Sequence[ClaimedRetry]) -> None:
        """Give attempts back whose delivery failed in a way that nobody has foreseen."""
        releases = [
            Release(task.id, task.claims, delay=FAILED_DELAY, unsettled=task.claims_unsettled)
            for task in tasks
        ]
        await _until_possible(lambda: self._repository.release(releases), logs.SETTLE_FAILED)

    async def deliver_quarantined(self, kept: Sequence[ClaimedQuarantine]) -> None:
        """Publish malformed input to manual review and note what has arrived there."""
        outcomes = await self._publisher.publish_quarantined(kept)
        settlements = []
        releases = []
        for item, outcome in zip(kept, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                settlements.append(Settlement(item.id, item.claims, "delivered"))
            else:
                releases.append(self._release(item, "malformed", outcome))
        if settlements:
            done = await _until_possible(
                lambda: self._repository.complete_quarantined(settlements), logs.SETTLE_FAILED
            )
            for item in kept:
                if item.id in done:
                    log.info(logs.QUARANTINE_DELIVERED, quarantine_id=item.id, field=item.field)
        if releases:
            await _until_possible(lambda: self._repository.release_quarantined(releases), logs.SETTLE_FAILED)
        if Outcome.RETURNED in outcomes:
            await self._restore_queues()

    def _review_reason(self, task: ClaimedRetry) -> str | None:
        """Why an attempt goes to people, or None if it goes back to its queue."""
        if task.retry_count >= task.max_retries:
            return "exhausted"
        if task.publish_failures >= self._max_publish_failures:
            return "unroutable"
        if task.claims_unsettled > UNPUBLISHABLE_AFTER:
            return "unpublishable"
        return None

    def _release(
        self, task: ClaimedRetry | ClaimedQuarantine, reason: str | None, outcome: Outcome
    ) -> Release:
        if outcome is Outcome.NOT_SENT:
            return Release(task.id, task.claims)
        roll = random.random()
        if outcome in (Outcome.UNKNOWN, Outcome.SUSPECT):
            self._metrics.unknown.inc()
            suspected = max(task.claims_unsettled, ALONE_AFTER) if outcome is Outcome.SUSPECT else 0
            delay = UNKNOWN_DELAY * (1 + roll)
            event = logs.RETRY_SUSPECT if suspected else logs.RETRY_UNKNOWN
            log.warning(event, **_fields(task), review_reason=reason)
            return Release(task.id, task.claims, error=outcome.value, delay=delay, unsettled=suspected)
        failures = task.publish_failures + 1
        delay = delay_before_republish(failures, self._policy, roll)
        if reason is None and isinstance(task, ClaimedRetry):
            self._metrics.executed(task.original_queue, success=False)
            if failures >= self._max_publish_failures:
                delay = timedelta(0)  # the next stop is manual review: waiting helps nobody
        log.warning(
            logs.RETRY_NOT_DELIVERED,
            **_fields(task),
            outcome=outcome.value,
            review_reason=reason,
            publish_failures=failures,
        )
        return Release(task.id, task.claims, failures=1, error=outcome.value, delay=delay)

    def _report(
        self,
        tasks: Sequence[ClaimedRetry],
        reasons: Sequence[str | None],
        settled: set[int],
        confirmed: set[int],
        since_claim_s: float,
    ) -> None:
        executed: Counter[str] = Counter()
        lines: list[dict[str, object]] = []
        for task, reason in zip(tasks, reasons, strict=True):
            if task.id not in confirmed:
                continue
            if task.id not in settled:
                self._metrics.overtaken.inc()
                log.warning(logs.RETRY_OVERTAKEN, **_fields(task))
            elif reason is None:
                executed[task.original_queue] += 1
                late_s = task.late_s + since_claim_s
                self._metrics.lateness.observe(late_s)
                lines.append(_fields(task) | {"late_ms": round(late_s * 1000, 1)})
            else:
                self._metrics.reviewed(task.original_queue, reason)
                event = logs.EXHAUSTED if reason == "exhausted" else logs.UNDELIVERABLE
                log.warning(event, **_fields(task), review_reason=reason)
        logs.info_lines(logs.RETRY_EXECUTED, lines)
        for queue, count in executed.items():
            self._metrics.executed(queue, success=True, count=count)

    async def _restore_queues(self) -> None:
        try:
            await self._publisher.restore_queues()
        except Unavailable as problem:  # tried again with the next message that is returned
            log.warning(logs.RABBITMQ_FAILED, purpose="create queues", error=problem.problem)


async def _until_possible(call: Callable[[], Awaitable[Result]], failed: str) -> Result:
    """Repeat `call` until PostgreSQL answers: what was published must be settled, whenever that is."""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except Unavailable as problem:
            log.error(failed, error=problem.problem)
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, LAST_PAUSE_S)


def _fields(task: ClaimedRetry | ClaimedQuarantine) -> dict[str, object]:
    if isinstance(task, ClaimedQuarantine):
        return {"quarantine_id": task.id, "field": task.field}
    return {
        "message_id": task.message_id,
        "original_queue": task.original_queue,
        "retry_count": task.retry_count,
        "error_reason": task.error_reason,
    }
