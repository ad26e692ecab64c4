"""Claims what is due, when it is due, and keeps a bounded number of rows in hand.

    asleep until the next due time (at most the poll interval) -> claim -> hand to the settler -> claim ...

Claiming, publishing and settling overlap: while one batch waits for its confirms the next is
claimed. How much may be on its way is for `hand` to say.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import structlog

from retry_scheduler import failpoints
from retry_scheduler.agenda import HORIZON_S, Agenda
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.errors import Unavailable
from retry_scheduler.hand import CLAIM_BYTES, MAX_QUARANTINED_IN_HAND, Hand, is_large, parted
from retry_scheduler.messages import ClaimedRetry
from retry_scheduler.observability import events
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.outage import OutageBackoff
from retry_scheduler.presence import BEAT_EVERY, Presence
from retry_scheduler.repository import LONG_AGO, Lease, Repository
from retry_scheduler.settlement import Settler
from retry_scheduler.supervision import STEP_AT_LEAST_EVERY_S, Progress

log = structlog.get_logger()

# Only a fallback, should a living instance lose sight of a row: the rows of one that has stopped
# beating are taken over after seconds. Much shorter and a long alarm of the broker, through which
# publications stay outstanding, would end in duplicates.
LEASE = timedelta(minutes=10)
PUBLISH_BEFORE_S = LEASE.total_seconds() / 2

LOOK_AHEAD = timedelta(seconds=HORIZON_S)

# Walking over some ten thousand dead index entries takes about this long.
SLOW_SEARCH_S = 0.02

# It may take as long as a statement may, and fail: while many dead entries remain, not every time.
SEARCH_ALL_EVERY_S = 60.0

# Less than the time between two beats, which wake the claiming loop.
PROBE_EVERY_S = 0.5

# People do not notice it, and with much malformed input one statement does for all that came meanwhile.
GATHER_QUARANTINED_S = 0.25

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
        self._quarantined = asyncio.Event()
        self._probed_at_s = 0.0
        self._floor = LONG_AGO
        self._claimed_since_search = False

    def resume(self) -> None:
        """Claim from now on; harmless when repeated."""
        self._paused = False
        self._agenda.expect((0.0,))
        self._changed.set()
        self._quarantined.set()

    def look_at_quarantine(self) -> None:
        """Somebody has quarantined something that manual review should get."""
        self._quarantined.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set and everything in hand is settled. One failing loop ends the others."""
        async with asyncio.TaskGroup() as loops:
            settled = asyncio.Event()
            loops.create_task(self._beat_until(settled), name="beat")
            search = loops.create_task(self._search_for_ever(), name="search")
            loops.create_task(self._wake_everybody_at(stop), name="wake at stop")
            quarantine = loops.create_task(self._deliver_quarantined(stop), name="quarantine")
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
            self._claimed_since_search = True
            parts = parted(tasks, self._hand.room_alone)
            self._hand.take(tasks)
            if parts.postponed:
                self._start(self._postpone(parts.postponed))
            for batch in parts.batches:
                self._start(self._deliver(batch, claimed_at_s, lease.owner))
        return bool(tasks) and tasks[0].more

    async def beat_once(self) -> None:
        """Show that this instance is alive, and learn what is coming. Raises Unavailable."""
        sent_at_s = time.monotonic()
        presence = self._presence
        failpoints.reach("before_beat")
        sighting = await self._repository.beat(presence.id, LOOK_AHEAD, self._floor, self._hand.ids)
        if sighting is None:  # just started, or buried by another instance
            presence.renew()
            await self._repository.join_instances(presence.id, self._name)
            self._progress.moved("beat")
            sent_at_s = time.monotonic()
            sighting = await self._repository.beat(presence.id, LOOK_AHEAD, self._floor, self._hand.ids)
            if sighting is None:
                return
        presence.beaten(sent_at_s)
        self._changed.set()
        self._agenda.expect(sighting.coming_s)
        if sighting.due_now:
            self._agenda.expect((0.0,))
        if sighting.quarantined:
            self._quarantined.set()
        presence.observe(sighting.beats, time.monotonic())
        still = presence.still(time.monotonic())
        if still:
            failpoints.reach("before_burial")
            for name in await self._repository.bury_instances(still):
                log.warning(events.INSTANCE_BURIED, instance=name)
            self._agenda.expect((0.0,))
            self._quarantined.set()

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
                self._agenda.expect((0.0,))  # what was due is due still

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
            return time.monotonic() - claimed_at_s < PUBLISH_BEFORE_S and self._trusts_leases_of(owner)

        in_hand = {task.id for task in tasks}
        large = is_large(tasks[0])

        def put_down(settled: Iterable[ClaimedRetry]) -> None:
            for task in settled:
                if task.id in in_hand:
                    in_hand.discard(task.id)
                    self._hand.put_down(task)
            if large:
                self._agenda.expect((0.0,))  # others like it may have been passed over
            self._changed.set()

        try:
            failpoints.reach("after_claim")
            if not await self._get_payloads(tasks):
                await self._settler.put_off(tasks)
            elif still_ours():
                await self._settler.deliver(tasks, claimed_at_s, still_ours=still_ours, on_settled=put_down)
            else:
                await self._settler.give_back(tasks)
        except Exception:  # a bug of ours: whatever was published is published once more, later
            log.exception(events.BATCH_FAILED, rows=len(tasks))
            await self._settler.put_off(tasks)
        finally:
            put_down(tasks)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        delivery = asyncio.create_task(work, name="delivery")
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)

    async def _postpone(self, tasks: Sequence[ClaimedRetry]) -> None:
        try:
            await self._settler.postpone(tasks)
        finally:
            for task in tasks:
                self._hand.put_down(task)
            self._changed.set()

    async def _get_payloads(self, tasks: list[ClaimedRetry]) -> bool:
        """Get what was too large to come with the claim. Returns False if PostgreSQL does not deliver it."""
        for task in filter(is_large, tasks):
            try:
                task.payload = await self._repository.payload(task)
            except Unavailable as problem:
                log.error(events.CLAIM_FAILED, error=problem.problem, payload_bytes=task.payload_bytes)
                return False
        return True

    async def _deliver_quarantined(self, stop: asyncio.Event) -> None:
        failures = OutageBackoff()
        while not stop.is_set():
            await self._quarantined.wait()
            self._quarantined.clear()
            try:
                while self._may_deliver_quarantined() and not stop.is_set():
                    limit_rows = MAX_QUARANTINED_IN_HAND if self._link.proven else 1
                    lease = self._lease(limit_rows)
                    kept = await self._repository.claim_quarantined(lease)
                    if not kept:
                        break
                    failpoints.reach("after_quarantine_claim")
                    still_ours = partial(self._trusts_leases_of, lease.owner)
                    if still_ours():  # otherwise whoever claims next finds them
                        await self._settler.deliver_quarantined(kept, still_ours=still_ours)
                    if len(kept) < limit_rows:
                        await asyncio.sleep(GATHER_QUARANTINED_S)
            except Unavailable as problem:  # a later beat will see that something waits
                log.error(events.QUARANTINE_CLAIM_FAILED, error=problem.problem)
            except Exception:  # a bug of ours: the next claim takes these rows again, after a pause
                log.exception(events.QUARANTINE_CLAIM_FAILED)
                await failures.wait()

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

    async def _search_for_ever(self) -> None:
        """Find out now and then where pending rows begin, if searching from the start has become slow.

        It has when many settled rows wait for a vacuum that some old transaction holds up. Usually
        there is no floor, and a row that an operator has moved far into the past is found by the
        next look. With a floor it is found by the next search from the start, if that gets through;
        the searches between begin at the floor and only raise it.
        """
        searched_all_at_s = float("-inf")
        while True:
            await asyncio.sleep(self._poll_interval_s)
            known = self._floor != LONG_AGO
            if not self._claimed_since_search and not known:
                continue
            self._claimed_since_search = False
            began_s = time.monotonic()
            from_floor = known and began_s - searched_all_at_s < SEARCH_ALL_EVERY_S
            if not from_floor:
                searched_all_at_s = began_s
            try:
                floor = await self._repository.search_floor(self._floor if from_floor else LONG_AGO)
            except Unavailable as problem:  # the floor that is known holds until the next search
                log.error(events.CLAIM_FAILED, error=problem.problem)
                continue
            slow = time.monotonic() - began_s > SLOW_SEARCH_S
            self._floor = floor if slow or from_floor else LONG_AGO

    async def _wake_everybody_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._agenda.expect((0.0,))
        self._changed.set()
        self._quarantined.set()

    def _may_deliver_quarantined(self) -> bool:
        return self._link.ready and not self._paused and self._trusts_leases_of(self._presence.id)

    def _trusts_leases_of(self, owner: UUID) -> bool:
        """Not frozen, cut off or renamed since: then others may have taken its rows."""
        return owner == self._presence.id and not self._presence.fenced(time.monotonic())

    def _lease(self, limit_rows: int) -> Lease:
        return Lease(
            self._presence.id,
            LEASE,
            limit_rows,
            CLAIM_BYTES,
            self._floor,
            frozenset(self._hand.ids),
            self._hand.limit_payload_bytes,
        )
