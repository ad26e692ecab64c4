"""Brings malformed input to people: claims what is quarantined until all of it has reached them.

    asleep until something was quarantined -> claim -> deliver -> gather for a moment -> claim ... -> asleep

A loop of its own beside the attempts': people can wait where a due attempt cannot.
"""

import asyncio
import time
from functools import partial
from uuid import UUID

import structlog

from retry_scheduler import failpoints
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.errors import Unavailable
from retry_scheduler.hand import CLAIM_BYTES, MAX_QUARANTINED_IN_HAND
from retry_scheduler.observability import events
from retry_scheduler.outage import OutageBackoff
from retry_scheduler.presence import LEASE, Presence
from retry_scheduler.repository import Lease, Repository
from retry_scheduler.settlement import Settler

log = structlog.get_logger()

# People do not notice it, and with much malformed input one statement does for all that came meanwhile.
GATHER_S = 0.25


class QuarantineDelivery:
    """The loop of one instance."""

    def __init__(
        self, repository: Repository, link: PublishLink, settler: Settler, presence: Presence, *, paused: bool
    ) -> None:
        """paused: nothing is claimed before `resume`."""
        self._repository = repository
        self._link = link
        self._settler = settler
        self._presence = presence
        self._paused = paused
        self._something = asyncio.Event()

    def look(self) -> None:
        """Wake the loop: something may have been quarantined."""
        self._something.set()

    def resume(self) -> None:
        """Claim from now on; harmless when repeated."""
        self._paused = False
        self.look()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; whoever sets it calls `look`."""
        failures = OutageBackoff()
        while not stop.is_set():
            await self._something.wait()
            self._something.clear()
            try:
                while self._may_claim() and not stop.is_set():
                    if not await self._run_once():
                        break
            except Unavailable as problem:  # a later beat will see that something waits
                log.error(events.QUARANTINE_CLAIM_FAILED, error=problem.problem)
            except Exception:  # a bug of ours: the next claim takes these rows again, after a pause
                log.exception(events.QUARANTINE_CLAIM_FAILED)
                await failures.wait()

    async def _run_once(self) -> bool:
        """Claim and deliver once. Returns whether there was anything. Raises Unavailable."""
        limit_rows = MAX_QUARANTINED_IN_HAND if self._link.proven else 1
        owner = self._presence.id
        kept = await self._repository.claim_quarantined(Lease(owner, LEASE, limit_rows, CLAIM_BYTES))
        if not kept:
            return False
        failpoints.reach("after_quarantine_claim")
        still_ours = partial(self._trusts_leases_of, owner)
        if still_ours():  # otherwise whoever claims next finds them
            await self._settler.deliver_quarantined(kept, still_ours=still_ours)
        if len(kept) < limit_rows:
            await asyncio.sleep(GATHER_S)
        return True

    def _may_claim(self) -> bool:
        return self._link.ready and not self._paused and self._trusts_leases_of(self._presence.id)

    def _trusts_leases_of(self, owner: UUID) -> bool:
        return self._presence.trusts_leases_of(owner, time.monotonic())
