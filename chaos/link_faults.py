"""Faults of a link: neither the server nor another instance notices anything of them.

    fault(link, dice)

Each is in force when it returns, and until `link.heal()`.
"""

import random
from collections.abc import Callable

from chaos.proxy import Proxy, Way

# Somewhere in a batch of statements or messages.
CUT_WITHIN_BYTES = 20_000
# One way. A statement that is not prepared yet takes two round trips.
DELAY_S = (0.2, 0.5)
# The load needs ten times as much.
THROTTLED_BYTES_PER_S = (100_000.0, 300_000.0)

LinkFault = Callable[[Proxy, random.Random], None]


def silence(link: Proxy, dice: random.Random) -> None:
    link.hold()


def mute(link: Proxy, dice: random.Random) -> None:
    """What the instance says does not arrive."""
    link.hold(Way.TO_SERVER)


def deafen(link: Proxy, dice: random.Random) -> None:
    """What the server says does not arrive: statements and messages do, and their answers are lost."""
    link.hold(Way.TO_CLIENT)


def forget(link: Proxy, dice: random.Random) -> None:
    """The connections there are fall silent for ever, and new ones work."""
    link.forget()


def refuse(link: Proxy, dice: random.Random) -> None:
    link.refuse()


def reset(link: Proxy, dice: random.Random) -> None:
    link.reset()


def cut(link: Proxy, dice: random.Random) -> None:
    """One connection is reset in the middle of what passes through it."""
    link.cut_after(dice.randrange(CUT_WITHIN_BYTES), dice.choice(list(Way)))


def delay(link: Proxy, dice: random.Random) -> None:
    link.slow_down(latency_s=dice.uniform(*DELAY_S))


def throttle(link: Proxy, dice: random.Random) -> None:
    link.slow_down(bytes_per_s=dice.uniform(*THROTTLED_BYTES_PER_S))


LINK_FAULTS: dict[str, LinkFault] = {
    fault.__name__: fault for fault in (silence, mute, deafen, forget, refuse, reset, cut, delay, throttle)
}
