"""Publishes claimed rows and settles each by what became of it. The row changes only after the confirm.

    claimed --publish--> confirmed            -> retried, or failed if it went to manual review
                         returned or refused  -> back to pending, due again later, one failure more
                         unknown              -> back to pending, due again soon, same x-retry-id
                         overdue              -> the same, after 0.25 to 20 s: its queue hangs
                         held                 -> back to pending, not sent: its queue hangs
                         suspect              -> the same, and from now on it travels alone; after
                                                 three such journeys it goes to manual review
                         too large            -> back to pending, to travel alone; once it has, to
                                                 manual review, without its payload
                         unsendable           -> back to pending, suspected: no message can be made of it
                         not sent             -> back to pending as it was

Crash windows: before the publish nothing has happened, and another instance takes the row over within
seconds (`presence`). Between publish and
settlement the message may have been delivered: whoever claims the row next sends it again, and the
consumer knows it by its x-retry-id.
"""

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog

from retry_scheduler import failpoints
from retry_scheduler.agenda import Agenda
from retry_scheduler.backoff import BackoffPolicy
from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.errors import Unavailable
from retry_scheduler.messages import ClaimedQuarantine, ClaimedRetry
from retry_scheduler.observability import events, logs
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.outage import OutageBackoff
from retry_scheduler.publisher import Accuse, Publisher, Wave
from retry_scheduler.releases import Releases, after_failure, fields, queued_up, unsent, without_payload
from retry_scheduler.repository import Release, Repository, Settlement, Suspicion
from retry_scheduler.suspicion import goes_to_people
from retry_scheduler.trials import Trials

if TYPE_CHECKING:  # loading it would load OpenTelemetry
    from retry_scheduler.observability.tracing import Tracing

log = structlog.get_logger()

Result = TypeVar("Result")


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
        tracing: "Tracing | None" = None,
    ) -> None:
        self._repository = repository
        self._publisher = publisher
        self._agenda = agenda
        self._metrics = metrics
        self._max_publish_failures = max_publish_failures
        self._releases = Releases(
            publisher, metrics, policy=policy, max_publish_failures=max_publish_failures
        )
        self._tracing = tracing
        self._outage = OutageBackoff()
        self._trials = Trials()

    async def deliver(
        self,
        tasks: Sequence[ClaimedRetry],
        claimed_at_s: float,
        *,
        still_ours: Callable[[], bool],
        on_settled: Callable[[Iterable[ClaimedRetry]], None],
    ) -> None:
        """Publish attempts, and settle each as soon as its fate is known.

        claimed_at_s: monotonic time just before they were claimed. still_ours: whether the leases hold.
        on_settled: told what is no longer in hand.
        """
        reasons = [self._review_reason(task) for task in tasks]
        open_places = set(range(len(tasks)))
        failpoints.reach("before_publish")
        began_ns = time.time_ns()
        publish = partial(self._publisher.publish, tasks, reasons, still_ours)
        async for wave in self._outcomes(tasks, publish, self._repository.suspect):
            late_s = time.monotonic() - claimed_at_s
            ended_ns = time.time_ns()
            confirmed = [(tasks[place], reasons[place]) for place, what in wave if what is Outcome.CONFIRMED]
            others = [
                (tasks[place], reasons[place], what) for place, what in wave if what is not Outcome.CONFIRMED
            ]
            if confirmed:
                await self._complete(confirmed, late_s)
            if others:
                releases = [self._releases.after(*other) for other in others]
                failpoints.reach("before_release")
                await self._give_back(releases)
            open_places.difference_update(place for place, _ in wave)
            on_settled(tasks[place] for place, _ in wave)
            if self._tracing is not None:
                self._trace(self._tracing, tasks, reasons, wave, late_s, began_ns, ended_ns)
            if any(what is Outcome.RETURNED and reason for _, reason, what in others):
                await self._restore_queues()
        if open_places:
            raise AssertionError(f"{len(open_places)} publications were left without an outcome")

    async def give_back_unsent(self, tasks: Sequence[ClaimedRetry]) -> None:
        """Give attempts back that were not published: they are due as before."""
        await self._give_back([unsent(task) for task in tasks])

    async def give_back_to_queue_up(self, tasks: Sequence[ClaimedRetry]) -> None:
        """Give attempts back that have to wait for their turn to travel alone."""
        await self._give_back([queued_up(task) for task in tasks])

    async def give_back_without_payload(self, tasks: Sequence[ClaimedRetry]) -> None:
        """Give attempts back whose payload PostgreSQL did not deliver in time: due again in a while."""
        await self._give_back([without_payload(task) for task in tasks])

    async def give_back_after_failure(self, tasks: Sequence[ClaimedRetry]) -> None:
        """Give attempts back on which our code failed: due again in a while, and the claim counts."""
        await self._give_back([after_failure(task) for task in tasks])

    async def deliver_quarantined(
        self, kept: Sequence[ClaimedQuarantine], *, still_ours: Callable[[], bool]
    ) -> None:
        """Publish malformed input to manual review and note what has arrived there."""
        publish = partial(self._publisher.publish_quarantined, kept, still_ours)
        async for wave in self._outcomes(kept, publish, self._repository.suspect_quarantined):
            delivered = [kept[place] for place, what in wave if what is Outcome.CONFIRMED]
            others = [
                self._releases.after(kept[place], "malformed", what)
                for place, what in wave
                if what is not Outcome.CONFIRMED
            ]
            if delivered:
                failpoints.reach("after_quarantine_confirm")
                settlements = [Settlement(item.id, item.claims, "delivered") for item in delivered]
                settled = await self._until_possible(
                    partial(self._repository.complete_quarantined, settlements)
                )
                failpoints.reach("after_quarantine_settle")
                for item in delivered:
                    if item.id in settled:
                        log.info(events.QUARANTINE_DELIVERED, **fields(item))
                    else:
                        self._note_overtaken(item)
            if others:
                await self._until_possible(partial(self._repository.release_quarantined, others))
            if any(what is Outcome.RETURNED for _, what in wave):
                await self._restore_queues()

    async def _outcomes(
        self,
        tasks: Sequence[ClaimedRetry | ClaimedQuarantine],
        publish: Callable[[Accuse], AsyncIterator[Wave]],
        suspect: Callable[[Sequence[Suspicion]], Awaitable[None]],
    ) -> AsyncIterator[Wave]:
        async def note(suspicions: Sequence[Suspicion]) -> None:
            await self._until_possible(partial(suspect, suspicions))

        async with self._trials.of(tasks, note) as accuse:
            async for wave in publish(accuse):
                yield wave

    async def _complete(
        self, confirmed: Sequence[tuple[ClaimedRetry, str | None]], since_claim_s: float
    ) -> None:
        failpoints.reach("after_confirm")
        settlements = [
            Settlement(task.id, task.claims, "retried" if reason is None else "failed", reason)
            for task, reason in confirmed
        ]
        settled = await self._until_possible(partial(self._repository.complete, settlements))
        failpoints.reach("after_settle")
        self._report(confirmed, settled, since_claim_s)

    async def _give_back(self, releases: Sequence[Release]) -> None:
        self._agenda.expect(await self._until_possible(partial(self._repository.release, releases)))

    def _review_reason(self, task: ClaimedRetry) -> str | None:
        """Why an attempt goes to people, or None if it goes back to its queue."""
        if task.retry_count >= task.max_retries:
            return "exhausted"
        if task.publish_failures >= self._max_publish_failures:
            return "unroutable"
        if task.payload is None or goes_to_people(task.claims_unsettled):
            return "unpublishable"
        return None

    def _report(
        self, confirmed: Sequence[tuple[ClaimedRetry, str | None]], settled: set[int], since_claim_s: float
    ) -> None:
        executed: Counter[str] = Counter()
        lines: list[dict[str, object]] = []
        for task, reason in confirmed:
            if task.id not in settled:
                self._note_overtaken(task)
            elif reason is None:
                executed[task.original_queue] += 1
                late_s = task.late_s + since_claim_s
                self._metrics.late(late_s)
                lines.append(fields(task) | {"late_ms": round(late_s * 1000, 1)})
            else:
                self._metrics.reviewed(task.original_queue, reason)
                event = events.EXHAUSTED if reason == "exhausted" else events.UNDELIVERABLE
                log.warning(event, **fields(task), review_reason=reason)
        logs.info_lines(events.RETRY_EXECUTED, lines)
        for queue, count in executed.items():
            self._metrics.executed(queue, success=True, count=count)

    def _note_overtaken(self, task: ClaimedRetry | ClaimedQuarantine) -> None:
        self._metrics.overtaken()
        log.warning(events.RETRY_OVERTAKEN, **fields(task))

    def _trace(
        self,
        tracing: "Tracing",
        tasks: Sequence[ClaimedRetry],
        reasons: Sequence[str | None],
        wave: Wave,
        since_claim_s: float,
        began_ns: int,
        ended_ns: int,
    ) -> None:
        for place, outcome in wave:
            if outcome in (Outcome.NOT_SENT, Outcome.HELD):  # nothing has happened
                continue
            task = tasks[place]
            tracing.published(
                message_id=task.message_id,
                original_queue=task.original_queue,
                retry_count=task.retry_count,
                retry_id=task.retry_id,
                review_reason=reasons[place],
                outcome=outcome.value,
                late_s=task.late_s + since_claim_s,
                body_bytes=len(task.payload or b""),
                traceparent=task.traceparent,
                began_ns=began_ns,
                ended_ns=ended_ns,
            )

    async def _until_possible(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Repeat `call` until PostgreSQL answers: what was published must be settled, whenever that is."""
        while True:
            try:
                return await call()
            except Unavailable as problem:
                log.error(events.SETTLE_FAILED, error=problem.problem)
            await self._outage.wait()

    async def _restore_queues(self) -> None:
        try:
            await self._publisher.restore_queues()
        except Unavailable as problem:  # tried again with the next message that is returned
            log.warning(events.RABBITMQ_FAILED, purpose="create queues", error=problem.problem)
