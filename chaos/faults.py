"""The faults themselves: each breaks something now and returns how it is healed.

    fault(stage, strike) -> heal()

Kills and freezes of an instance, and the lock, choose their moment: see `moment`. Those of links are in
`link_faults`.
"""

import asyncio
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable

from chaos.bed import ROLE
from chaos.horizon import PinnedHorizon
from chaos.link_faults import LINK_FAULTS
from chaos.moment import hold_table_lock, strike_in_time
from chaos.requests import FULL_QUEUE, REVIEW_QUEUE
from chaos.schedule import BROKER_LINK, DATABASE_LINK, Strike, target_of
from chaos.stage import Stage
from retry_scheduler.demo.processes import PrivateServerError

Heal = Callable[[], None]
Fault = Callable[[Stage, Strike], Heal]

# Where a crash matters (docs/data_flow.md), and where every instance under load comes within a second.
DEADLY_POINTS = (
    "before_store",
    "before_quarantine",
    "before_ack",
    "after_claim",
    "before_publish",
    "before_confirm",
    "after_confirm",
    "after_settle",
    "after_quarantine_claim",
    "after_quarantine_confirm",
    "after_quarantine_settle",
    "before_beat",
)

# A lock waits for the statements before it.
LOCKED_WITHIN_S = 3.0
# Of a full machine; a trial that waits longer has found something.
RECOVERS_WITHIN_S = 60.0


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
    return stage.lift_alarm


def full_queue(stage: Stage, strike: Strike) -> Heal:
    """Whatever is published to this queue is refused; what is in it is delivered."""
    return _fill(stage, FULL_QUEUE)


def full_review(stage: Stage, strike: Strike) -> Heal:
    return _fill(stage, REVIEW_QUEUE)


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
    _tell_database(stage, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'")
    return _nothing


def kill_backend(stage: Stage, strike: Strike) -> Heal:
    """One backend that is killed takes the whole server through its crash recovery."""
    pid = _tell_database(
        stage, f"SELECT pid FROM pg_stat_activity WHERE usename = '{ROLE}' ORDER BY random() LIMIT 1"
    )
    if pid:
        os.kill(int(pid), signal.SIGKILL)

    def heal() -> None:
        _tell_database(stage, "SELECT 1")

    return heal


def lock_table(stage: Stage, strike: Strike) -> Heal:
    locked = threading.Event()
    held = hold_table_lock(stage.place, strike, locked.set)
    holding = threading.Thread(target=asyncio.run, args=(held,), name="lock")
    holding.start()
    locked.wait(LOCKED_WITHIN_S)
    return holding.join


def read_only(stage: Stage, strike: Strike) -> Heal:
    """The database answers and takes no writes, as the former primary does after a failover."""
    _configure(stage, "ALTER SYSTEM SET default_transaction_read_only = on")
    return lambda: _configure(stage, "ALTER SYSTEM RESET default_transaction_read_only")


def pin_horizon(stage: Stage, strike: Strike) -> Heal:
    horizon = PinnedHorizon(stage.place)
    horizon.pin()
    return horizon.release


def kill_instance(stage: Stage, strike: Strike) -> Heal:
    instance = stage.instances[strike.instance]
    strike_in_time(stage.place, strike, instance.kill, pid=instance.pid)
    return instance.start


def kill_at_failpoint(stage: Stage, strike: Strike) -> Heal:
    instance = stage.instances[strike.instance]
    instance.die_at(random.Random(str(strike)).choice(DEADLY_POINTS))
    return instance.start


def freeze_instance(stage: Stage, strike: Strike) -> Heal:
    instance = stage.instances[strike.instance]
    strike_in_time(stage.place, strike, instance.freeze, pid=instance.pid)
    return instance.thaw


def restart_instance(stage: Stage, strike: Strike) -> Heal:
    instance = stage.instances[strike.instance]
    instance.terminate()
    return instance.start


def break_link(stage: Stage, strike: Strike) -> Heal:
    links = stage.links[strike.instance]
    link = links.broker if target_of(strike.fault) == BROKER_LINK else links.database
    LINK_FAULTS[strike.fault.partition(" ")[0]](link, random.Random(str(strike)))
    return link.heal


FAULTS: dict[str, Fault] = {
    **{
        fault.__name__.replace("_", " "): fault
        for fault in (
            kill_broker,
            stop_broker,
            freeze_broker,
            smother_broker,
            cut_broker_connections,
            broker_alarm,
            full_queue,
            full_review,
            kill_database,
            stop_database,
            freeze_database,
            cut_database_connections,
            kill_backend,
            lock_table,
            read_only,
            pin_horizon,
            kill_instance,
            kill_at_failpoint,
            freeze_instance,
            restart_instance,
        )
    },
    **{f"{name} {target}": break_link for name in LINK_FAULTS for target in (BROKER_LINK, DATABASE_LINK)},
}


def _fill(stage: Stage, queue: str) -> Heal:
    place = stage.place
    limits = json.dumps({"max-length": 0, "overflow": "reject-publish"})
    pattern = f"^{re.escape(queue)}$"
    place.rabbitmq.ctl("set_policy", "-p", place.name, "--apply-to", "queues", "full", pattern, limits)

    def heal() -> None:
        place.rabbitmq.ctl("clear_policy", "-p", place.name, "full")

    return heal


def _configure(stage: Stage, statement: str) -> None:
    _tell_database(stage, statement)
    _tell_database(stage, "SELECT pg_reload_conf()")


def _tell_database(stage: Stage, statement: str) -> str:
    """Return what it answers once it has recovered from the fault before. Raises PrivateServerError."""
    given_up_at_s = time.monotonic() + RECOVERS_WITHIN_S
    while True:
        try:
            return stage.place.sql(statement)
        except PrivateServerError:
            if time.monotonic() > given_up_at_s:
                raise
        time.sleep(0.1)
