"""Claims what is due, when it is due, and keeps a bounded number of rows in hand.

    asleep until the next due time -> claim -> hand to the settler -> claim ...

Claiming, publishing and settling overlap: while one batch waits for its confirms the next is
claimed. How much may be on its way is for `hand` to say.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import structlog

from retry_scheduler import failpoints
from retry_scheduler.agenda import HORIZON_S, Agenda
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.errors import Unavailable
from retry_scheduler.floor_search import FloorSearch
from retry_scheduler.hand import CLAIM_BYTES, Hand, is_large, parted
from retry_scheduler.messages import ClaimedRetry
from retry_scheduler.observability import events
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.outage import OutageBackoff
from retry_scheduler.presence import BEAT_EVERY, LEASE, Presence
from retry_scheduler.quarantine_delivery import QuarantineDelivery
from retry_scheduler.repository import Lease, Repository, Sighting
from retry_scheduler.settlement import Settler
from retry_scheduler.supervision import STEP_AT_LEAST_EVERY_S, Progress
from retry_scheduler.suspicion import payload_may_go

log = structlog.get_logger()

PUBLISH_BEFORE_S = LEASE.total_seconds() / 2

LOOK_AHEAD = timedelta(seconds=HORIZON_S)

# Less than the time between two beats, which wake the claiming loop.
PROBE_EVERY_S = 0.5

# However short the poll interval is set: each beat is a transaction.
SHORTEST_POLL_S = 0.1


class Scheduler:
    """The loops that make due attempts happen: claim, quarantine, beat."""

    def __init__(
        self,
        repository: Repository,
        link: PublishLink,
        settler: Settler,
        agenda: Agenda,
        presence: Presence,
        metrics: Metrics,
        *,
        name: str,
        poll_interval: timedelta,
        progress: Progress,
        paused: bool = False,
    ) -> None:
        """paused: nothing is claimed before `resume`."""
        self._paused = paused
        self._repository = repository
        self._link = link
        self._settler = settler
        self._agenda = agenda
        self._presence = presence
        self._metrics = metrics
        self._name = name
        self._poll_interval_s = max(poll_interval.total_seconds(), SHORTEST_POLL_S)
        self._progress = progress
        self._hand = Hand()
        self._deliveries: set[asyncio.Task[None]] = set()
        self._changed = link.changed  # also set when anything else changes that claiming waits for
        self._probed_at_s = 0.0
        self._floor_search = FloorSearch(repository, every_s=self._poll_interval_s)
        self._quarantine = QuarantineDelivery(repository, link, settler, presence, paused=paused)

    def resume(self) -> None:
        """Claim from now on; harmless when repeated."""
        self._paused = False
        self._agenda.wake()
        self._changed.set()
        self._quarantine.resume()

    def look_at_quarantine(self) -> None:
        """Somebody has quarantined something that manual review should get."""
        self._quarantine.look()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set and everything in hand is settled. One failing loop ends the others."""
        async with asyncio.TaskGroup() as loops:
            settled = asyncio.Event()
            loops.create_task(self._beat_until(settled), name="beat")
            search = loops.create_task(self._floor_search.run(), name="search")
            loops.create_task(self._wake_everybody_at(stop), name="wake at stop")
            quarantine = loops.create_task(self._quarantine.run(stop), name="quarantine")
            await self._deliver_due(stop)
            failpoints.reach("while_stopping")
            await quarantine
            while self._deliveries:
                await asyncio.wait(set(self._deliveries))
            search.cancel()
            # Not cancelled: a beat that is under way might enter the register after we have left it.
            settled.set()
        failpoints.reach("before_leaving")
        with suppress(Unavailable):  # otherwise the others will see the beat stand still
            await self._repository.leave_instances(self._presence.id)

    async def run_once(self) -> bool:
        """Claim one batch and start its delivery. Returns whether more may be due. Raises Unavailable."""
        limit_rows = max(self._claimable(), 1)
        if not self._link.proven:
            self._probed_at_s = time.monotonic()
        claimed_at_s = time.monotonic()
        lease = self._lease(limit_rows)
        tasks = await self._repository.claim_due(lease)
        if tasks:
            self._floor_search.note_claim()
            parts = parted(tasks, self._hand.room_alone)
            self._hand.take(tasks)
            if parts.to_queue_up:
                self._start(self._let_queue_up(parts.to_queue_up))
            for batch in parts.batches:
                self._start(self._deliver(batch, claimed_at_s, lease.owner))
        return bool(tasks) and tasks[0].more

    async def beat_once(self) -> None:
        """Show that this instance is alive, and learn what is coming. Raises Unavailable."""
        sent_at_s = time.monotonic()
        presence = self._presence
        failpoints.reach("before_beat")
        sighting = await self._beat()
        if sighting is None:  # just started, or buried by another instance
            presence.renew()
            await self._repository.join_instances(presence.id, self._name)
            self._progress.moved("beat")
            sent_at_s = time.monotonic()
            sighting = await self._beat()
            if sighting is None:
                return
        presence.beaten(sent_at_s)
        self._changed.set()
        self._agenda.expect(sighting.coming_s)
        if sighting.due_now:
            self._agenda.wake()
        if sighting.quarantined:
            self._quarantine.look()
        presence.observe(sighting.beats, time.monotonic())
        still = presence.still(time.monotonic())
        if still:
            failpoints.reach("before_burial")
            for name in await self._repository.bury_instances(still):
                log.warning(events.INSTANCE_BURIED, instance=name)
            self._agenda.wake()
            self._quarantine.look()

    async def _deliver_due(self, stop: asyncio.Event) -> None:
        outage = OutageBackoff()
        while not stop.is_set():
            self._progress.moved("claim")
            if not await self._agenda.wait(STEP_AT_LEAST_EVERY_S):
                continue
            try:
                while not stop.is_set():
                    await self._wait_until_claimable(stop)
                    if stop.is_set() or not await self.run_once():
                        break
            except Unavailable as problem:
                log.error(events.CLAIM_FAILED, error=problem.problem)
                await outage.wait()
                self._agenda.wake()  # what was due is due still

    async def _beat(self) -> Sighting | None:
        floor = self._floor_search.floor
        return await self._repository.beat(self._presence.id, LOOK_AHEAD, floor, self._hand.ids)

    def _claimable(self) -> int:
        """How many rows it makes sense to claim now.

        None while paused, our leases cannot be trusted, the broker takes no messages, or the hand is full.
        One through a connection that has not proven itself; as many again with each beat that brings no
        confirm, since perhaps only the queue of the first ones hangs.
        """
        now_s = time.monotonic()
        if self._paused or self._presence.fenced(now_s) or not self._link.ready:
            return 0
        if self._link.proven:
            return self._hand.room(slow=self._link.slow)
        if self._hand and now_s - self._probed_at_s < PROBE_EVERY_S:
            return 0
        return self._hand.room_for_probes()

    async def _wait_until_claimable(self, stop: asyncio.Event) -> None:
        self._progress.moved("claim")
        while not stop.is_set() and not self._claimable():
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(STEP_AT_LEAST_EVERY_S):
                    await self._changed.wait()
            self._progress.moved("claim")

    async def _deliver(self, tasks: list[ClaimedRetry], claimed_at_s: float, owner: UUID) -> None:
        def still_ours() -> bool:
            now_s = time.monotonic()
            return now_s - claimed_at_s < PUBLISH_BEFORE_S and self._presence.trusts_leases_of(owner, now_s)

        in_hand = {task.id for task in tasks}
        large = is_large(tasks[0])

        def put_down(settled: Iterable[ClaimedRetry]) -> None:
            for task in settled:
                if task.id in in_hand:
                    in_hand.discard(task.id)
                    self._hand.put_down(task)
            if large:
                self._agenda.wake()  # others like it may have been passed over
            self._changed.set()

        try:
            failpoints.reach("after_claim")
            if missing := await self._get_payloads(tasks):
                await self._settler.give_back_without_payload(missing)
                put_down(missing)
            gone = {task.id for task in missing}
            complete = [task for task in tasks if task.id not in gone]
            if still_ours():
                await self._settler.deliver(
                    complete, claimed_at_s, still_ours=still_ours, on_settled=put_down
                )
            else:
                await self._settler.give_back_unsent(complete)
        except Exception:  # a bug of ours: whatever was published is published once more, later
            log.exception(events.BATCH_FAILED, rows=len(tasks))
            await self._settler.give_back_after_failure([task for task in tasks if task.id in in_hand])
        finally:
            put_down(tasks)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        delivery = asyncio.create_task(work, name="delivery")
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)

    async def _let_queue_up(self, tasks: Sequence[ClaimedRetry]) -> None:
        try:
            await self._settler.give_back_to_queue_up(tasks)
        finally:
            for task in tasks:
                self._hand.put_down(task)
            self._changed.set()

    async def _get_payloads(self, tasks: Sequence[ClaimedRetry]) -> list[ClaimedRetry]:
        """Get what was too large to come with the claim. Returns those whose payload does not come."""
        missing: list[ClaimedRetry] = []
        for task in tasks:
            if not is_large(task) or not payload_may_go(task.claims_unsettled):
                continue
            try:
                task.payload = await self._repository.payload(task)
            except Unavailable as problem:
                log.error(events.CLAIM_FAILED, error=problem.problem, payload_bytes=task.payload_bytes)
                missing.append(task)
        return missing

    async def _beat_until(self, settled: asyncio.Event) -> None:
        while not settled.is_set():
            self._progress.moved("beat")
            began_s = time.monotonic()
            try:
                await self.beat_once()
            except Unavailable as problem:
                self._metrics.reconnecting(problem.server)
                log.warning(events.POSTGRES_FAILED, error=problem.problem)
            period_s = min(BEAT_EVERY.total_seconds(), self._poll_interval_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(began_s + period_s - time.monotonic(), period_s / 10)):
                    await settled.wait()

    async def _wake_everybody_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._agenda.wake()
        self._changed.set()
        self._quarantine.look()

    def _lease(self, limit_rows: int) -> Lease:
        return Lease(
            self._presence.id,
            LEASE,
            limit_rows,
            CLAIM_BYTES,
            self._floor_search.floor,
            frozenset(self._hand.ids),
            self._hand.limit_payload_bytes,
        )
