"""The faults themselves: each breaks something now and returns how it is healed.

    fault(stage, strike) -> heal()

Kills and freezes of an instance, and the lock, choose their moment: see `moment`.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chaos.bed import ROLE, Place
from chaos.instance import Instance
from chaos.moment import hold_table_lock, strike_in_time
from chaos.schedule import Strike

Heal = Callable[[], None]

# A lock waits for the statements before it.
LOCKED_WITHIN_S = 3.0


@dataclass(frozen=True)
class Stage:
    """What a fault may break."""

    place: Place
    instances: Sequence[Instance]

    def heal_all(self) -> None:
        """Whatever was done, and whatever state it is in: everything runs, nothing is frozen or blocked."""
        for server in (self.place.postgres, self.place.rabbitmq):
            server.thaw()
            if not server.is_running:
                server.start()
        _lift_alarm(self)
        for instance in self.instances:
            instance.thaw()
            if not instance.is_running:
                instance.start()


def _nothing() -> None:
    """Nothing is left to heal."""


def kill_broker(stage: Stage, strike: Strike) -> Heal:
    stage.place.rabbitmq.kill()
    return stage.place.rabbitmq.start


def stop_broker(stage: Stage, strike: Strike) -> Heal:
    stage.place.rabbitmq.stop()
    return stage.place.rabbitmq.start


def freeze_broker(stage: Stage, strike: Strike) -> Heal:
    stage.place.rabbitmq.freeze()
    return stage.place.rabbitmq.thaw


def smother_broker(stage: Stage, strike: Strike) -> Heal:
    stage.place.rabbitmq.freeze()

    def heal() -> None:
        stage.place.rabbitmq.kill()
        stage.place.rabbitmq.start()

    return heal


def cut_broker_connections(stage: Stage, strike: Strike) -> Heal:
    stage.place.rabbitmq.ctl("close_all_connections", "--vhost", stage.place.name, "chaos")
    return _nothing


def broker_alarm(stage: Stage, strike: Strike) -> Heal:
    stage.place.rabbitmq.ctl("set_disk_free_limit", "10000GB")
    return lambda: _lift_alarm(stage)


def kill_database(stage: Stage, strike: Strike) -> Heal:
    stage.place.postgres.kill()
    return stage.place.postgres.start


def stop_database(stage: Stage, strike: Strike) -> Heal:
    stage.place.postgres.stop()
    return stage.place.postgres.start


def freeze_database(stage: Stage, strike: Strike) -> Heal:
    stage.place.postgres.freeze()
    return stage.place.postgres.thaw


def cut_database_connections(stage: Stage, strike: Strike) -> Heal:
    stage.place.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'")
    return _nothing


def kill_backend(stage: Stage, strike: Strike) -> Heal:
    """One backend that is killed takes the whole server through its crash recovery."""
    pid = stage.place.sql(
        f"SELECT pid FROM pg_stat_activity WHERE usename = '{ROLE}' ORDER BY random() LIMIT 1"
    )
    if pid:
        os.kill(int(pid), signal.SIGKILL)
    return _nothing


def lock_table(stage: Stage, strike: Strike) -> Heal:
    locked = threading.Event()
    held = hold_table_lock(stage.place, strike, locked.set)
    holding = threading.Thread(target=asyncio.run, args=(held,), name="lock")
    holding.start()
    locked.wait(LOCKED_WITHIN_S)
    return holding.join


def kill_instance(stage: Stage, strike: Strike) -> Heal:
    instance = stage.instances[strike.instance]
    strike_in_time(stage.place, strike, instance.kill, pid=instance.pid)
    return instance.start


def freeze_instance(stage: Stage, strike: Strike) -> Heal:
    instance = stage.instances[strike.instance]
    strike_in_time(stage.place, strike, instance.freeze, pid=instance.pid)
    return instance.thaw


def restart_instance(stage: Stage, strike: Strike) -> Heal:
    instance = stage.instances[strike.instance]
    instance.terminate()
    return instance.start


FAULTS: dict[str, Callable[[Stage, Strike], Heal]] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        kill_broker,
        stop_broker,
        freeze_broker,
        smother_broker,
        cut_broker_connections,
        broker_alarm,
        kill_database,
        stop_database,
        freeze_database,
        cut_database_connections,
        kill_backend,
        lock_table,
        kill_instance,
        freeze_instance,
        restart_instance,
    )
}


def _lift_alarm(stage: Stage) -> None:
    stage.place.rabbitmq.ctl("set_disk_free_limit", "50MB")
