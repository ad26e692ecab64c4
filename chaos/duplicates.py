"""Which deliveries are duplicates, and whether a fault explains each of them. Pure.

A delivery marked as redelivered is the broker's doing. Every other one is a publication of the service.
A second publication of one x-retry-id needs a reason:

    unknown    the service said that it did not learn what became of it, during a fault of the broker or of
               its own link to it, or while or after it was frozen itself
    overtaken  another instance had buried it, or it was frozen; and it had published before
    killed     the process that had published was killed, or ended without settling

Without such a reason a duplicate is a violation, and so is every one while nothing is broken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chaos.history import Arrival, Event, Fault, History
from chaos.schedule import BROKER, BROKER_LINK, DATABASE, DATABASE_LINK, INSTANCE

UNKNOWN = (
    "Retry outcome unknown - will be sent again under the same x-retry-id",
    "Retry may have closed the channel - will be sent again alone",
)
OVERTAKEN = "Retry settled by another instance"
# Of malformed input the service does not notice that another instance has settled it.
MALFORMED_MOVED = "Malformed request moved to manual review"
BURIED = "An instance has stopped beating - its claimed retries are taken over"
UNSETTLED = "Stopping without settling everything: a server does not answer; the rest will be taken over"

# In these the broker goes on answering, that it refuses a message or takes none. They cost no confirm.
REFUSING = {"full queue", "full review"}
ANSWERING = {*REFUSING, "broker alarm"}

# A confirm is waited for during 10 s, and its loss is noted, settled and logged after that.
UNKNOWN_GRACE_S = 15.0
# From a publication until a consumer has it in its log, while the broker works.
ARRIVAL_S = 2.0
# From a publication to its settlement, while everything works.
SETTLES_S = 2.0


class Explanations:
    """What can be said for the duplicates of one history."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._deaths = list(_deaths(history))
        self._frozen = list(_frozen(history))
        self._buried = {
            (str(event.instance).rpartition(":")[2], event.at)  # an instance is named host:pid
            for event in history.events
            if event.message == BURIED
        }

    def unexplained(self, arrivals: Sequence[Arrival]) -> int:
        """How many of the arrivals under one x-retry-id are duplicates that nothing explains."""
        if publications(arrivals) <= 1:
            return 0
        return max(publications(arrivals) - 1 - self._reasons(arrivals), 0)

    def killed_near(self, at: float) -> bool:
        """Whether what was done at `at` may be the doing of a process that died before it could say so."""
        return any(death.earliest <= at <= death.latest for death in self._deaths)

    def _reasons(self, arrivals: Sequence[Arrival]) -> int:
        told = self._history.events_by_id.get(arrivals[0].retry_id, ())
        said = sum(self._accepted(event, arrivals) for event in told)
        died = sum(
            any(death.earliest <= arrival.at <= death.latest for arrival in arrivals)
            for death in self._deaths
        )
        return said + died

    def _accepted(self, event: Event, arrivals: Sequence[Arrival]) -> bool:
        instance = self._history.instance_of.get(event.pid)
        if event.message in UNKNOWN:
            return self._confirms_lost(event.at, instance) or any(
                pid == event.pid and began <= event.at <= ended + UNKNOWN_GRACE_S
                for pid, began, ended in self._frozen
            )
        if event.message in (OVERTAKEN, MALFORMED_MOVED):
            return any(
                arrival.at <= since + ARRIVAL_S or self._held_up(arrival.at, instance)
                for since in self._out_of_action(event)
                for arrival in arrivals
            )
        return False

    def _out_of_action(self, event: Event) -> Iterator[float]:
        """Yield since when the process that says so had been frozen or buried before."""
        frozen = [(began, ended) for pid, began, ended in self._frozen if pid == event.pid]
        yield from (began for began, _ in frozen if began <= event.at)
        for pid, at in self._buried:
            # A frozen one is buried while it is frozen. Others have stopped publishing well before.
            was_frozen = any(began <= at <= ended for began, ended in frozen)
            if pid == str(event.pid) and at <= event.at + SETTLES_S and not was_frozen:
                yield at - ARRIVAL_S

    def _confirms_lost(self, noticed_at: float, instance: str | None) -> bool:
        """Whether an instance may have lost a confirm, and noticed it then."""
        return any(
            fault.near(noticed_at, UNKNOWN_GRACE_S)
            for fault in self._broker_outages(instance)
            if fault.name not in ANSWERING
        )

    def _held_up(self, arrived_at: float, instance: str | None) -> bool:
        """Whether what arrived then may have been published long before."""
        return any(fault.near(arrived_at, ARRIVAL_S) for fault in self._broker_outages(instance))

    def _broker_outages(self, instance: str | None) -> Iterator[Fault]:
        for fault in self._history.faults:
            if fault.target in (BROKER, BROKER_LINK) and is_outage(fault) and fault.hits(instance):
                yield fault


def is_outage(fault: Fault) -> bool:
    """Whether a server is away in it, for all instances or for one."""
    servers = (BROKER, DATABASE, BROKER_LINK, DATABASE_LINK)
    return fault.target in servers and fault.name not in REFUSING


def publications(arrivals: Sequence[Arrival]) -> int:
    """How many publications stand behind the arrivals under one x-retry-id, in their order, at least."""
    if not arrivals:
        return 0
    # One that was marked at its first arrival was lost on its way once, unmarked.
    return sum(not arrival.redelivered for arrival in arrivals) + arrivals[0].redelivered


def most_duplicates(history: History, outstanding: int, instances: int) -> int:
    """The contract's bound: what may be outstanding, for each instance that was hit by each fault."""
    harmful = [fault for fault in history.faults if is_outage(fault) or fault.target == INSTANCE]
    hit = sum(instances if fault.instance is None else 1 for fault in harmful)
    hit += sum(event.message == BURIED for event in history.events)
    return hit * outstanding


@dataclass(frozen=True)
class _Death:
    """The end of a process that left something unsettled.

    earliest: from when on it may have published or stored something and not settled or said it; while a
    server is away for it, nothing is settled. latest: until when such a server may have carried out its
    last wish.
    """

    earliest: float
    at: float
    latest: float


def _deaths(history: History) -> Iterator[_Death]:
    killed = [(event.at, event.pid) for event in history.instance_events if event.what == "kill"]
    gave_up = [(event.at, event.pid) for event in history.events if event.message == UNSETTLED]
    for at, pid in sorted([*killed, *gave_up]):
        instance = history.instance_of.get(pid)
        outages = [fault for fault in history.faults if is_outage(fault) and fault.hits(instance)]
        earliest, latest = at - SETTLES_S, at + SETTLES_S
        for fault in sorted(outages, key=lambda fault: fault.began, reverse=True):
            if fault.near(earliest, SETTLES_S):
                earliest = min(earliest, fault.began - SETTLES_S)
        for server in ((BROKER, BROKER_LINK), (DATABASE, DATABASE_LINK)):
            latest = max(latest, _reached_by(at, [f for f in outages if f.target in server]))
        for frozen, began, ended in _frozen(history):
            if frozen == pid and began <= at <= ended + SETTLES_S:
                earliest = min(earliest, began - SETTLES_S)
        yield _Death(earliest, at, latest)


def _reached_by(at: float, outages: Sequence[Fault]) -> float:
    """Until when a server may carry out what was said to it at `at`, if it was away, once or repeatedly."""
    latest = at + SETTLES_S
    for fault in sorted(outages, key=lambda fault: fault.began):
        if fault.began <= latest and at <= fault.healed + SETTLES_S:
            latest = max(latest, fault.healed + SETTLES_S)
    return latest


def _frozen(history: History) -> Iterator[tuple[int, float, float]]:
    """Yield (pid, began, ended) of each time that a process was frozen."""
    since: dict[int, float] = {}
    for event in history.instance_events:
        if event.what == "freeze":
            since[event.pid] = event.at
        elif event.what in ("thaw", "kill") and event.pid in since:
            yield event.pid, since.pop(event.pid), event.at
