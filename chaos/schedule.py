"""Which fault strikes when: drawn from the seed before anything runs. Pure arithmetic.

One fault at a time, or two that overlap, each against a target of its own: the broker, the database, an
instance of the service, or an instance's link to one of the servers. Every kind has its turn before one
comes again. In the middle of it all an old transaction keeps the database from cleaning up.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

BROKER, DATABASE, INSTANCE = "broker", "database", "instance"
BROKER_LINK, DATABASE_LINK = "broker link", "database link"
# Faults of one instance alone.
OF_ONE = (INSTANCE, BROKER_LINK, DATABASE_LINK)
# Hurts nobody by itself, and so goes on while other faults come and go.
HORIZON, PIN_HORIZON = "horizon", "pin horizon"

# Some outlast the wait for a confirm (10 s) or for an answer of the database (6 s).
LINK_LASTS_S: Mapping[str, tuple[float, float]] = {
    "silence": (2, 13),
    "mute": (2, 13),
    "deafen": (2, 13),
    "forget": (7, 13),
    "refuse": (1, 4),
    "reset": (0, 0),
    "cut": (1, 2),
    "delay": (4, 8),
    "throttle": (4, 8),
}

# Which faults there are, against what, and how long they last, in seconds; 0: a blow, nothing to heal.
# `smother` is a freeze that outlasts the wait for a confirm (10 s) and ends in a kill.
LASTS_S: Mapping[str, Mapping[str, tuple[float, float]]] = {
    BROKER: {
        "kill broker": (1, 4),
        "stop broker": (1, 4),
        "freeze broker": (2, 8),
        "smother broker": (11.5, 12.5),
        "cut broker connections": (0, 0),
        "broker alarm": (2, 14),
        "full queue": (2, 6),
        "full review": (2, 6),
    },
    DATABASE: {
        "kill database": (1, 4),
        "stop database": (1, 4),
        "freeze database": (2, 8),
        "cut database connections": (0, 0),
        "kill backend": (0, 0),
        "lock table": (2, 6),
        "read only": (2, 6),
    },
    INSTANCE: {
        "kill instance": (0.5, 3),
        "kill at failpoint": (0.5, 3),
        "freeze instance": (1, 9),
        "restart instance": (0, 0),
    },
    **{
        target: {f"{fault} {target}": lasts_s for fault, lasts_s in LINK_LASTS_S.items()}
        for target in (BROKER_LINK, DATABASE_LINK)
    },
}

OVERLAPPING = 0.4
SHORTEST_GAP_S, LONGEST_GAP_S = 2.0, 5.0

# The pinned horizon, in parts of the whole time.
PIN_BEGINS = (0.05, 0.25)
PIN_LASTS = (0.4, 0.6)


@dataclass(frozen=True, order=True)
class Strike:
    """One fault. at_s: from the beginning of the schedule. instance: which one, where it is one.

    at_once: do not wait for a moment at which rows are in hand.
    """

    at_s: float
    fault: str
    lasts_s: float = 0.0
    instance: int = 0
    at_once: bool = False


def target_of(fault: str) -> str:
    """Return what a fault is aimed at. Raises KeyError if there is no such fault."""
    if fault == PIN_HORIZON:
        return HORIZON
    return {fault: target for target, faults in LASTS_S.items() for fault in faults}[fault]


def random_schedule(seed: int, seconds: float, instances: int) -> list[Strike]:
    """Return strikes that begin and end within `seconds`, in their order."""
    dice = random.Random(f"{seed} schedule")
    bags = {target: _bag(dice, tuple(faults)) for target, faults in LASTS_S.items()}
    begins, lasts = dice.uniform(*PIN_BEGINS), dice.uniform(*PIN_LASTS)
    strikes = [Strike(round(begins * seconds, 2), PIN_HORIZON, round(lasts * seconds, 2))]
    at_s = 0.0
    while True:
        targets = dice.sample(tuple(bags), k=2 if dice.random() < OVERLAPPING else 1)
        together: list[Strike] = []
        for target in targets:
            fault = next(bags[target])
            begins_s = at_s + (dice.uniform(0, 1.5) if together else 0)
            lasts_s = round(dice.uniform(*LASTS_S[target][fault]), 2)
            together.append(Strike(round(begins_s, 2), fault, lasts_s, dice.randrange(instances)))
        at_s = max(strike.at_s + strike.lasts_s for strike in together)
        if at_s > seconds:
            return sorted(strikes)
        strikes += together
        at_s += dice.uniform(SHORTEST_GAP_S, LONGEST_GAP_S)


def _bag(dice: random.Random, faults: Sequence[str]) -> Iterator[str]:
    while True:
        yield from dice.sample(faults, k=len(faults))
