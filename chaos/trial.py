"""One trial: load on running instances, faults by schedule, all healed, quiet, and the history of it all.

warm up -> faults -> heal all -> a little more load -> load off -> quiet -> read everything
"""

import random
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from chaos.amqp import QueueConsumer, declare_queues
from chaos.bed import Bed, Place
from chaos.history import History
from chaos.instance import COMMAND, Instance
from chaos.links import links
from chaos.monitor import Monitor
from chaos.nemesis import Nemesis
from chaos.oplog import OperationLog
from chaos.programs import Generator, ReviewSink, Worker
from chaos.reading import OPERATIONS, QUARANTINED, ROWS, Ending, leaks_in, read_history
from chaos.requests import MIX, QUEUES, RETRY_QUEUE, REVIEW_QUEUE
from chaos.schedule import Strike
from chaos.stage import Stage
from retry_scheduler.demo.processes import PrivateServerError

BASE_DELAY_MS, MAX_DELAY_MS = 200, 3000
POOL_MAX = 10
# The service's delays shrunk, so that many attempts fit into a minute; the rest as it comes.
SETTINGS = {
    "BASE_DELAY_MS": str(BASE_DELAY_MS),
    "MAX_DELAY_MS": str(MAX_DELAY_MS),
    "JITTER_MS": "100",
    "MAX_PUBLISH_FAILURES": "3",
    "RABBITMQ_PREFETCH": "50",
    "POSTGRES_POOL_MIN": "4",
    "POSTGRES_POOL_MAX": str(POOL_MAX),
}

ALL_QUEUES = (*QUEUES, RETRY_QUEUE, REVIEW_QUEUE)

GENERATORS = 2
LOOK_EVERY_S = 0.5
# Lines of the log are written by a thread of their own, and counters move at once.
LOGS_FOLLOW_WITHIN_S = 0.5
# A connection whose peer has fallen silent may be noticed only now: three heartbeats, and 5 s to heal.
READY_WITHIN_S = 38.0


@dataclass(frozen=True)
class Plan:
    """What to do in a trial. per_second: requests of all generators; the failing workers add two thirds."""

    seed: int
    strikes: Sequence[Strike]
    instances: int = 2
    warm_up_s: float = 5.0
    after_s: float = 4.0
    quiet_within_s: float = 60.0
    per_second: float = 100.0
    mix: Mapping[str, float] = field(default_factory=lambda: MIX)
    command: Sequence[str] = COMMAND
    settings: Mapping[str, str] = field(default_factory=dict)


def run_trial(bed: Bed, plan: Plan, folder: Path) -> History:
    """Run one trial in a database and a virtual host of its own, and return its history.

    folder: empty; gets the operation log and the services' logs.
    Raises PrivateServerError or ExceptionGroup if the trial itself fails, and so proves nothing.
    """
    with ExitStack() as leaving:
        place = leaving.enter_context(bed.place(f"chaos_{time.monotonic_ns()}"))
        log = OperationLog(folder / OPERATIONS)
        leaving.callback(log.close)
        ways = [leaving.enter_context(links(place)) for _ in range(plan.instances)]
        instances = [
            Instance(
                f"instance-{number}",
                folder=folder,
                settings={**way.settings(place), **SETTINGS, **plan.settings},
                log=log,
                command=plan.command,
            )
            for number, way in enumerate(ways, start=1)
        ]
        for instance in instances:
            leaving.callback(instance.discard)
            instance.start()
        declare_queues(place.url, *ALL_QUEUES)
        for instance in instances:
            instance.wait_until_ready()
        _observe(plan, Stage(place, instances, ways), log, leaving).save(folder)
    return read_history(folder)


def _observe(plan: Plan, stage: Stage, log: OperationLog, leaving: ExitStack) -> Ending:
    place, instances = stage.place, stage.instances
    consumers = [
        *(Worker(place.url, log, queue=queue, seed=str(plan.seed)) for queue in QUEUES),
        ReviewSink(place.url, log),
    ]
    generators = [
        Generator(
            place.url,
            log,
            name=f"generator-{number}",
            dice=random.Random(f"{plan.seed} generator {number}"),
            per_second=plan.per_second / GENERATORS,
            mix=plan.mix,
        )
        for number in range(1, GENERATORS + 1)
    ]
    monitor = Monitor(place, instances, log)
    programs: list[QueueConsumer | Generator | Monitor] = [*consumers, *generators, monitor]
    for program in programs:
        program.start()
        leaving.callback(program.stop)

    log.write("phase", "ok", name="warm up")
    time.sleep(plan.warm_up_s)
    monitor.look("warm")
    log.write("phase", "ok", name="faults")
    Nemesis(stage, log).run(plan.strikes)
    healed_at = log.write("phase", "ok", name="healed")
    time.sleep(plan.after_s)
    if not all([each.is_alive for each in consumers] + [each.is_alive for each in generators]):
        raise RuntimeError("a program of this test has died: the trial proves nothing")
    stopping = [threading.Thread(target=generator.stop) for generator in generators]
    for thread in stopping:
        thread.start()
    for thread in stopping:
        thread.join()
    left = _left_after(place, plan.quiet_within_s)
    quiet_at = None if left else log.write("phase", "ok", name="quiet")
    not_ready = _not_ready_after(instances, min(READY_WITHIN_S, plan.quiet_within_s))
    time.sleep(LOGS_FOLLOW_WITHIN_S)
    monitor.stop()
    monitor.look("end")
    leaks = [leak for each in instances for leak in leaks_in(each.visible().encode(), f"{each.name} itself")]
    for consumer in consumers:
        consumer.stop()
    return Ending(
        rows=place.rows(ROWS),
        quarantined=place.rows(QUARANTINED),
        healed_at=healed_at,
        quiet_at=quiet_at,
        left=left,
        not_ready=not_ready,
        backoff_ms=(BASE_DELAY_MS, MAX_DELAY_MS),
        connections=monitor.connections(),
        connections_most=POOL_MAX * len(instances),
        leaks=leaks,
    )


def _left_after(place: Place, within_s: float) -> str:
    """Wait until nothing is left to do, and return what is left after all; empty if nothing is."""
    deadline = time.monotonic() + within_s
    looks = ["nobody has looked", "nobody has looked"]
    # Twice: what moves on between two readings of one look may be seen by neither.
    while any(looks[-2:]) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
        looks.append(_left(place))
    return looks[-1] or looks[-2]


def _not_ready_after(instances: Sequence[Instance], within_s: float) -> list[str]:
    """Wait until every instance says that it works, and return the names of those that do not."""
    deadline = time.monotonic() + within_s
    while True:
        waiting = [each.name for each in instances if not each.is_ready()]
        if not waiting or time.monotonic() > deadline:
            return waiting
        time.sleep(LOOK_EVERY_S)


def _left(place: Place) -> str:
    try:
        queued = {queue: place.rabbitmq.queue_depth(place.name, queue) for queue in ALL_QUEUES}
        (waiting,) = place.rows(
            "SELECT (SELECT count(*) FROM retry_queue WHERE status = 'pending') AS pending,"
            " (SELECT count(*) FROM retry_quarantine WHERE delivered_at IS NULL) AS quarantined"
        )
    except PrivateServerError as error:
        return f"a server does not answer: {error}"
    found = {**queued, **waiting}
    return ", ".join(f"{name} {count}" for name, count in found.items() if count)
