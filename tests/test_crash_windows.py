"""A crash at each failpoint, in each way: nothing is lost, and how often each message is sent is known.

Each point has a scene of its own: a database, a virtual host, two instances that are put through one
fault after the other. The scenes run side by side, since most of a fault's time is spent waiting for
the others to notice it. What was sent is counted at the end, when every instance has left.
"""

import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.failpoints import Point
from tests.contract import LATE_AT_MOST_S
from tests.crash_scene import (
    AT_MOST_TWICE,
    LONG,
    OFTEN,
    ONCE,
    TWICE,
    Provoke,
    Scene,
    Wave,
    beat,
    bury,
    claim,
    claim_for_a_missing_queue,
    receive,
    receive_malformed,
    receive_mixed,
    stop,
)
from tests.factories import new_id
from tests.failing_service import POINTS, Failpoints
from tests.servers import Database, random_name
from tests.service_process import PROJECT, MakeService, ServiceProcess
from tests.table import Table
from tests.upstream import RETRY_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

# Scenes at a time: more, and starting programs would keep the others from beating.
SIDE_BY_SIDE = 7
EXIT_OF_A_BUG = 70

# A beat that is this old has been fenced, and nobody else is there to bury its owner.
LONG_FROZEN = "SELECT clock_timestamp() - beat_at > interval '2.2 s' FROM retry_instance WHERE id = $1"


@dataclass(frozen=True)
class Window:
    """One point: how an instance is brought there, and how often what it has in hand is sent.

    killed: if it dies there. overtaken: if it is frozen there until another has taken over, and thaws.
    broken: if an exception is raised there, which ends the process if `fatal`.
    """

    point: Point
    provoke: Provoke
    killed: frozenset[int] = ONCE
    overtaken: frozenset[int] = ONCE
    broken: frozenset[int] = ONCE
    fatal: bool = False


WINDOWS = [
    Window("before_store", receive, fatal=True),
    Window("before_quarantine", receive_mixed, fatal=True),
    Window("before_ack", receive, fatal=True),
    Window("after_claim", claim),
    Window("before_publish", claim),
    # The broker has answered one message. What it has not read by then dies with the connection.
    Window("before_confirm", claim, killed=AT_MOST_TWICE, overtaken=TWICE, broken=AT_MOST_TWICE),
    Window("after_confirm", claim, killed=TWICE, overtaken=TWICE, broken=TWICE),
    # Nothing is in hand, unless the broker's answers came in two waves.
    Window("after_settle", claim, killed=AT_MOST_TWICE, overtaken=AT_MOST_TWICE),
    Window("before_release", claim_for_a_missing_queue),
    Window("after_quarantine_claim", receive_malformed),
    Window("after_quarantine_confirm", receive_malformed, killed=TWICE, overtaken=TWICE, broken=TWICE),
    Window("after_quarantine_settle", receive_malformed, killed=AT_MOST_TWICE, overtaken=AT_MOST_TWICE),
    Window("before_beat", beat, fatal=True),
    Window("before_burial", bury, fatal=True),
    Window("while_stopping", stop, fatal=True),
    Window("before_leaving", stop, fatal=True),
]


class Rescues(dict[str, list[float]]):
    """By fault, how long each wave had to wait for somebody else."""

    def note(self, fault: str, seconds: float) -> None:
        self.setdefault(fault, []).append(round(seconds, 2))


@dataclass
class Play:
    """One point's scene, and the faults that it is put through."""

    scene: Scene
    window: Window
    rescues: Rescues

    async def all(self) -> None:
        for fault in (
            self.frozen_beside_another,
            self.killed_beside_another,
            self.frozen_alone,
            self.killed_alone,
            self.broken,
        ):
            try:
                await fault()
            except BaseException as error:
                error.add_note(f"at {self.window.point}: {fault.__name__}")
                raise
        await self.scene.leave()
        await self.scene.check()

    async def fault(self, name: str, action: str) -> Wave:
        wave = Wave(f"{self.window.point}.{name}", [new_id() for _ in range(20)])
        self.scene.upstream.declare(wave.queue)
        self.scene.waves.append(wave)
        await self.window.provoke(self.scene, wave, self.window.point, action)
        return wave

    async def frozen_beside_another(self) -> None:
        scene = self.scene
        await scene.run(2)
        wave = await self.fault("frozen_beside_another", "freeze")
        victim = await scene.victim(self.window.point)
        owner = await scene.id_of(victim)
        await scene.note_hand(wave, owner, self.window.overtaken)
        stored = "SELECT count(*) = 0 FROM retry_queue WHERE status = 'pending'"
        await eventually(lambda: scene.table.value(stored), within=LONG, every=OFTEN)
        gone = f"SELECT gone_at IS NOT NULL FROM retry_instance WHERE id = '{owner}'"
        await eventually(lambda: scene.table.value(gone), within=LONG, every=OFTEN)
        victim.thaw()
        await scene.done(wave)
        if wave.in_hand:
            latest_s = await scene.latest_s(wave)
            self.rescues.note("frozen", latest_s)
            assert latest_s <= LATE_AT_MOST_S
        if self.window.provoke is stop:
            assert await victim.wait_until_ended() == 0
            return
        await victim.wait_until_ready()
        if wave.copies == TWICE:
            await eventually(
                lambda: victim.metrics().value("retry_stale_completions_total") == len(wave.in_hand),
                within=LONG,
            )

    async def killed_beside_another(self) -> None:
        scene = self.scene
        await scene.run(2)
        wave = await self.fault("killed_beside_another", "kill")
        victim = await scene.victim(self.window.point)
        await scene.note_hand(wave, await scene.id_of(victim), self.window.killed)
        await scene.done(wave)
        if wave.in_hand:
            latest_s = await scene.latest_s(wave)
            self.rescues.note("killed", latest_s)
            assert latest_s <= LATE_AT_MOST_S

    async def frozen_alone(self) -> None:
        scene = self.scene
        await scene.run(1)
        wave = await self.fault("frozen_alone", "freeze")
        victim = await scene.victim(self.window.point)
        owner = await scene.id_of(victim)
        await eventually(lambda: scene.table.value(LONG_FROZEN, owner), within=LONG, every=OFTEN)
        victim.thaw()
        if self.window.provoke is stop:
            assert await victim.wait_until_ended() == 0
            await scene.run(1)
        await scene.done(wave)

    async def killed_alone(self) -> None:
        scene = self.scene
        await scene.run(1)
        wave = await self.fault("killed_alone", "kill")
        victim = await scene.victim(self.window.point)
        await scene.note_hand(wave, await scene.id_of(victim), self.window.killed)
        victim.start()
        await victim.wait_until_ready()
        ready_at = await scene.table.value("SELECT clock_timestamp()")
        await scene.done(wave)
        if wave.in_hand:
            rescued_s = await scene.settled_after_s(wave, ready_at)
            self.rescues.note("restarted", rescued_s)
            assert rescued_s <= LATE_AT_MOST_S

    async def broken(self) -> None:
        scene = self.scene
        await scene.run(1)
        (service,) = scene.running
        wave = await self.fault("broken", "fail")
        if self.window.fatal:
            assert await service.wait_until_ended() == EXIT_OF_A_BUG
            service.start()
        await scene.done(wave)
        await scene.note_claimed_again(wave, self.window.broken)


@pytest.fixture
def make_scene(
    postgres: PrivatePostgres, rabbitmq: PrivateRabbitMQ, make_service: MakeService, tmp_path: Path
) -> Iterator[Callable[[], "Scene"]]:
    made: list[tuple[str, Scene]] = []

    def make() -> Scene:
        name = random_name()
        postgres.create_database(name, owner=Database.user)
        rabbitmq.add_vhost(name)
        folder = tmp_path / name
        folder.mkdir()
        failpoints = Failpoints(folder)

        def instance() -> ServiceProcess:
            return make_service(
                POSTGRES_DB=name,
                RABBITMQ_URL=rabbitmq.url(name),
                RABBITMQ_PREFETCH="100",
                **failpoints.settings,
            )

        upstream = Upstream(rabbitmq.url(name))
        upstream.declare(RETRY_QUEUE, "warm")
        scene = Scene(instance, failpoints, upstream, Table(Database(postgres.host, postgres.port, name)))
        made.append((name, scene))
        return scene

    yield make
    for name, scene in made:
        for service in scene.services:
            service.kill()
        postgres.drop_database(name)
        rabbitmq.delete_vhost(name)


def test_each_failpoint_has_its_window_and_stands_at_one_place() -> None:
    sources = "".join(path.read_text() for path in (PROJECT / "retry_scheduler").rglob("*.py"))

    assert [window.point for window in WINDOWS] == list(POINTS)
    assert [sources.count(f'failpoints.reach("{point}")') for point in POINTS] == [1] * len(POINTS)


def test_nothing_in_the_package_listens_at_failpoints() -> None:
    listening = [
        path.name
        for path in (PROJECT / "retry_scheduler").rglob("*.py")
        if re.search(r"failpoints(\.| import .*)(listen|_listener)", path.read_text())
    ]

    assert listening == []


async def test_an_event_loop_that_hangs_is_no_different_from_a_frozen_instance(
    make_scene: Callable[[], Scene],
) -> None:
    async def play(point: Point) -> None:
        scene = make_scene()
        await scene.run(2)
        wave = Wave("hanging", [new_id() for _ in range(20)])
        scene.waves.append(wave)
        scene.upstream.declare(wave.queue)
        await claim(scene, wave, point, "hang")
        await eventually(lambda: scene.failpoints.reached(point), within=LONG)
        owner = await scene.table.value(
            "SELECT DISTINCT claimed_by FROM retry_queue WHERE claims = 1 AND status = 'pending'"
        )
        await scene.note_hand(wave, str(owner), ONCE)
        assert len(wave.in_hand) == len(wave)
        await scene.done(wave)
        assert await scene.latest_s(wave) <= LATE_AT_MOST_S
        await scene.leave()
        await scene.check()

    async with asyncio.TaskGroup() as plays:
        plays.create_task(play("after_claim"))
        plays.create_task(play("before_publish"))


@pytest.mark.timeout(300)
async def test_a_crash_at_each_point_loses_nothing_and_sends_again_only_what_was_in_hand(
    make_scene: Callable[[], Scene], record_property: Callable[[str, object], None]
) -> None:
    rescues = Rescues()
    places = asyncio.Semaphore(SIDE_BY_SIDE)

    async def play(window: Window) -> None:
        async with places:
            await Play(make_scene(), window, rescues).all()

    async with asyncio.TaskGroup() as plays:
        for window in sorted(
            WINDOWS, key=lambda window: window.provoke not in (claim, bury)
        ):  # longest first
            plays.create_task(play(window))

    for fault, seconds in rescues.items():
        record_property(f"{fault}_rows_rescued_after_s", f"{min(seconds)} to {max(seconds)}")
