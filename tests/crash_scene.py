"""The stage of the crash tests: two instances with servers' corners of their own, and ways to a failpoint."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import zip_longest

from retry_scheduler.failpoints import Point
from tests.factories import make_request
from tests.failing_service import Failpoints
from tests.service_process import ServiceProcess
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

ONCE = frozenset({1})
TWICE = frozenset({2})
AT_MOST_TWICE = ONCE | TWICE

AN_HOUR_MS = 3_600_000
SOON_MS = 1500

OFTEN = timedelta(milliseconds=250)
LONG = timedelta(seconds=20)

# The messages of a wave, by the name of its queue: a malformed one begins with it.
_OF_WAVE = "convert_from(raw_body, 'UTF8') LIKE $1 || ' %'"

_IN_HAND = """
    SELECT message_id || ':' || retry_count AS retry_id FROM retry_queue
     WHERE claimed_by = $1 AND status = 'pending'
     UNION ALL
    SELECT 'quarantine:' || id FROM retry_quarantine WHERE claimed_by = $1 AND delivered_at IS NULL
"""

_CLAIMED_AGAIN = f"""
    SELECT message_id || ':' || retry_count AS retry_id FROM retry_queue
     WHERE original_queue = $1 AND claims > 1
     UNION ALL
    SELECT 'quarantine:' || id FROM retry_quarantine WHERE {_OF_WAVE} AND claims > 1
"""

_DONE = f"""
    SELECT (SELECT count(*) FROM retry_queue WHERE original_queue = $1 AND status = 'retried')
         + (SELECT count(*) FROM retry_quarantine
             WHERE {_OF_WAVE} AND delivered_at IS NOT NULL)
"""

_SETTLED_AT = f"""
    SELECT greatest((SELECT max(finished_at) FROM retry_queue WHERE original_queue = $1),
                    (SELECT max(delivered_at) FROM retry_quarantine WHERE {_OF_WAVE}))
"""

_LATEST_S = f"""
    SELECT extract(epoch FROM max(late))::float8
      FROM (SELECT finished_at - next_retry_at FROM retry_queue WHERE original_queue = $1
             UNION ALL
            SELECT delivered_at - received_at FROM retry_quarantine
             WHERE {_OF_WAVE}) AS rows (late)
"""


@dataclass
class Wave:
    """The messages of one fault. in_hand: keys of what the victim had claimed and not settled."""

    queue: str
    good: list[str]
    malformed: list[bytes] = field(default_factory=list)
    in_hand: frozenset[str] = frozenset()
    copies: frozenset[int] = ONCE  # of what was in hand; of the rest always one

    def __len__(self) -> int:
        return len(self.good) + len(self.malformed)


class Scene:
    """Two instances with a database and a virtual host of their own, and what happens to them."""

    def __init__(
        self, make: Callable[[], ServiceProcess], failpoints: Failpoints, upstream: Upstream, table: Table
    ):
        self.failpoints = failpoints
        self.upstream = upstream
        self.table = table
        self.services = [make(), make()]
        self.waves: list[Wave] = []
        self.ran: list[ServiceProcess] = []

    @property
    def running(self) -> list[ServiceProcess]:
        return [service for service in self.services if service.is_running]

    async def run(self, instances: int) -> None:
        """Have so many instances run, each trusted with whole batches because it has delivered something."""
        for service in self.services:
            if len(self.running) > instances:
                assert await service.stop() == 0
            elif len(self.running) < instances and not service.is_running:
                service.start()
        await asyncio.gather(*(service.wait_until_ready() for service in self.running))
        while not all(_delivered(service) for service in self.running):
            self.upstream.ask(*(make_request(original_queue="warm") for _ in range(4)))
            await eventually(self.table.settled, within=LONG, every=OFTEN)
        self.ran = self.running

    async def victim(self, point: Point) -> ServiceProcess:
        """Wait until one of those that ran has come to the point, and stands still or has died."""

        def hit() -> list[ServiceProcess]:
            return [service for service in self.ran if service.is_frozen or not service.is_running]

        await eventually(lambda: self.failpoints.reached(point) and hit(), within=LONG)
        (one,) = hit()
        return one

    async def id_of(self, service: ServiceProcess) -> str:
        """The id under which an instance claims."""
        return str(
            await self.table.value(
                "SELECT id FROM retry_instance WHERE name LIKE '%:' || $1::text AND gone_at IS NULL",
                str(service.pid),
            )
        )

    async def note_hand(self, wave: Wave, owner: str, copies: frozenset[int]) -> None:
        """Note what an instance has claimed and not settled, and how often that may be sent."""
        rows = await self.table.fetch(_IN_HAND, owner)
        wave.in_hand, wave.copies = frozenset(row["retry_id"] for row in rows), copies

    async def note_claimed_again(self, wave: Wave, copies: frozenset[int]) -> None:
        """Note what has been claimed more than once, and how often that may have been sent."""
        rows = await self.table.fetch(_CLAIMED_AGAIN, wave.queue)
        wave.in_hand, wave.copies = frozenset(row["retry_id"] for row in rows), copies

    async def settled_after_s(self, wave: Wave, moment: datetime) -> float:
        """How long after `moment`, by the database's clock, the last of the wave's messages was settled."""
        settled_at: datetime = await self.table.value(_SETTLED_AT, wave.queue)
        return (settled_at - moment).total_seconds()

    async def latest_s(self, wave: Wave) -> float:
        """How late the last of the wave's messages was settled, in seconds after it was due."""
        return float(await self.table.value(_LATEST_S, wave.queue))

    async def done(self, wave: Wave) -> None:
        """Wait until each of the wave's messages has been delivered."""

        async def all_done() -> bool:
            return bool(await self.table.value(_DONE, wave.queue) == len(wave)) and await self.table.settled()

        await eventually(all_done, within=LONG, every=OFTEN)

    async def leave(self) -> None:
        """Stop every instance, so that all it might have sent is there."""
        await asyncio.gather(*(service.stop() for service in self.running))

    async def check(self) -> None:
        """Compare what has been sent with what may have been."""
        assert (await self.table.statuses()).keys() == {"retried"}
        sent = Counter(message.retry_id for message in self.upstream.take(REVIEW_QUEUE))
        assert self.upstream.depth(RETRY_QUEUE) == 0
        for wave in self.waves:
            sent.update(message.retry_id for message in self.upstream.take(wave.queue))
            kept = await self.table.fetch(
                "SELECT id FROM retry_quarantine WHERE raw_body = ANY ($1::bytea[])", wave.malformed
            )
            keys = {f"{message_id}:0" for message_id in wave.good} | {
                f"quarantine:{row['id']}" for row in kept
            }
            assert len(keys) == len(wave), wave.queue
            assert wave.in_hand <= keys, wave.queue
            counts = {key: sent.pop(key, 0) for key in keys}
            wrong = {
                key: count
                for key, count in counts.items()
                if count not in (wave.copies if key in wave.in_hand else ONCE)
            }
            assert not wrong, f"{wave.queue}: of {sorted(wave.in_hand)} in hand: {wrong}"
        assert not sent, "sent without being asked for"


Provoke = Callable[[Scene, Wave, Point, str], Awaitable[None]]


async def receive(scene: Scene, wave: Wave, point: Point, action: str) -> None:
    """Have an instance receive the wave."""
    scene.failpoints.arm(point, action)
    _ask(scene, wave, retry_after_ms=0)


async def receive_mixed(scene: Scene, wave: Wave, point: Point, action: str) -> None:
    """Have an instance receive as many malformed messages as good ones, and a malformed one first."""
    wave.malformed = [f"{wave.queue} {number}".encode() for number in range(len(wave.good))]
    await receive(scene, wave, point, action)


async def receive_malformed(scene: Scene, wave: Wave, point: Point, action: str) -> None:
    """Have an instance receive malformed messages, and so claim them for manual review."""
    wave.malformed = [f"{wave.queue} {number}".encode() for number in range(len(wave.good))]
    wave.good = []
    await receive(scene, wave, point, action)


async def claim(scene: Scene, wave: Wave, point: Point, action: str) -> None:
    """Have an instance claim the whole wave at once."""
    await _store(scene, wave, retry_after_ms=AN_HOUR_MS)
    scene.failpoints.arm(point, action)
    await scene.table.fetch(
        "UPDATE retry_queue SET next_retry_at = clock_timestamp() WHERE original_queue = $1", wave.queue
    )


async def claim_for_a_missing_queue(scene: Scene, wave: Wave, point: Point, action: str) -> None:
    """Have the broker return the whole wave."""
    scene.upstream.delete(wave.queue)
    await claim(scene, wave, point, action)
    await eventually(lambda: scene.failpoints.reached(point), within=LONG)
    scene.upstream.declare(wave.queue)


async def beat(scene: Scene, wave: Wave, point: Point, action: str) -> None:
    """Have the wave in the table, to be due when the fault has happened."""
    await _store(scene, wave, retry_after_ms=SOON_MS)
    scene.failpoints.arm(point, action)


async def bury(scene: Scene, wave: Wave, point: Point, action: str) -> None:
    """Have the wave claimed by an instance that has stopped beating."""
    await _store(scene, wave, retry_after_ms=AN_HOUR_MS)
    scene.failpoints.arm(point, action)
    await scene.table.fetch(
        "WITH gone AS (INSERT INTO retry_instance (id, name) VALUES (gen_random_uuid(), 'gone') RETURNING id)"
        " UPDATE retry_queue SET next_retry_at = clock_timestamp(), claimed_by = gone.id, claims = 1,"
        " claimed_until = clock_timestamp() + interval '1 min' FROM gone WHERE original_queue = $1",
        wave.queue,
    )


async def stop(scene: Scene, wave: Wave, point: Point, action: str) -> None:
    """Stop an instance while the wave is in the table."""
    await _store(scene, wave, retry_after_ms=SOON_MS)
    scene.failpoints.arm(point, action)
    scene.running[0].terminate()


def _ask(scene: Scene, wave: Wave, *, retry_after_ms: int) -> None:
    good = [
        make_request(message_id=message_id, original_queue=wave.queue, retry_after_ms=retry_after_ms)
        for message_id in wave.good
    ]
    # A malformed one is in the first batch already: of good ones alone, some would be sent before the fault.
    pairs = zip_longest(wave.malformed, good)
    scene.upstream.ask_for_many([body for pair in pairs for body in pair if body])


async def _store(scene: Scene, wave: Wave, *, retry_after_ms: int) -> None:
    _ask(scene, wave, retry_after_ms=retry_after_ms)
    stored = "SELECT count(*) FROM retry_queue WHERE original_queue = $1"
    await eventually(lambda: _equals(scene.table.value(stored, wave.queue), len(wave)), within=LONG)


async def _equals(value: Awaitable[object], expected: object) -> bool:
    return await value == expected


def _delivered(service: ServiceProcess) -> bool:
    return service.metrics().value("retries_executed_total", status="success") > 0
