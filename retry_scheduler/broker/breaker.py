"""The circuit breaker of each destination queue: what may still be sent to one that does not confirm.

    closed --(confirms are slow)--> open --(they are overdue)--> open, and hanging
       ^------(anything is confirmed there after all)------'---------'

While a circuit is open, what is outstanding at its queue is not sent again: it lies there, and would
arrive twice when the queue recovers. Of the rest one message a minute is sent as a probe, and the
others are held. What has been answered late is known to whoever would send it next.

On a new connection nothing is outstanding, and each open circuit is probed at once.

Pure: no network, and the clock is a parameter (monotonic seconds).
"""

from retry_scheduler.broker.confirms import Outcome

PROBE_EVERY_S = 60.0

# What is held is looked at again after half the time that its circuit has been open, within these bounds.
SHORTEST_HOLD_S = 0.25
LONGEST_HOLD_S = 10.0

# However much is held, for however many queues, so many a second are looked at, half of what could be
# delivered: the looks must leave the others their share.
LOOKS_PER_S = 4000.0

# So long a late answer is of use; a row that nobody sends again by then was settled by another instance.
LATE_ANSWER_KEPT_S = 600.0


class _Circuit:
    """An open one."""

    __slots__ = ("hanging", "opened_at_s", "probe_at_s", "probed")

    def __init__(self, now_s: float) -> None:
        self.hanging = False
        self.probed = True  # what opened it is outstanding on this connection, or was sent to find out
        self.opened_at_s = now_s
        self.probe_at_s = now_s + PROBE_EVERY_S


class Breaker:
    """Knows a publication by its key and its claim: the number of the lease under which it is sent."""

    def __init__(self) -> None:
        self._open: dict[str, _Circuit] = {}
        self._next_look_s = 0.0
        self._queues: dict[str, str] = {}  # key -> queue, of what is outstanding behind an open circuit
        self._overdue: dict[str, int] = {}  # key -> claim, of that which nobody waits for any more
        self._late: dict[str, tuple[int, str, Outcome, float]] = {}  # key -> claim, queue, answer, when

    @property
    def idle(self) -> bool:
        """Whether every message may be sent, and no answer is of interest."""
        return not (self._open or self._queues or self._late)

    def hold_s(self, queue: str, now_s: float, roll: float) -> float:
        """Return for how many seconds to hold one more message for `queue`. roll: 0 to 1, at random."""
        circuit = self._open.get(queue)
        if circuit is None:  # it has just closed
            return SHORTEST_HOLD_S * (1 + roll)
        usual_s = min(max((now_s - circuit.opened_at_s) / 2, SHORTEST_HOLD_S), LONGEST_HOLD_S)
        self._next_look_s = max(self._next_look_s + 1 / LOOKS_PER_S, now_s)
        return max(usual_s * (1 + roll), self._next_look_s - now_s)

    def slow(self, key: str, queue: str, now_s: float) -> None:
        """Note that something has been outstanding at `queue` for long, and that somebody waits for it."""
        self._queues[key] = queue
        if queue not in self._open:
            self._open[queue] = _Circuit(now_s)

    def suspect(self, queue: str, now_s: float) -> bool:
        """Note that a queue seems to hang. Returns whether that is news."""
        circuit = self._open.setdefault(queue, _Circuit(now_s))
        known, circuit.hanging = circuit.hanging, True
        return not known

    def overdue(self, key: str, claim: int, queue: str, now_s: float) -> bool:
        """Note that nobody waits any more for what is outstanding at `queue`. Returns as `suspect`."""
        self._queues[key] = queue
        self._overdue[key] = claim
        oldest_s = now_s - LATE_ANSWER_KEPT_S
        self._late = {each: late for each, late in self._late.items() if late[3] > oldest_s}
        return self.suspect(queue, now_s)

    def admit(self, key: str, claim: int, queue: str, now_s: float) -> Outcome | None:
        """Return None if a publication may be sent, otherwise what is known of it without sending.

        A late answer counts only for the claim that follows the one it was sent under, and for the queue that
        gave it: if others have had the row meanwhile, they may have settled it, and an operator may want it
        sent once more, or elsewhere.
        """
        late = self._late.pop(key, None)
        if late is not None and (claim - 1, queue) == late[:2]:
            return late[2]
        circuit = self._open.get(queue)
        if circuit is None:
            return None
        if key in self._overdue:
            self._overdue[key] = claim
            return Outcome.HELD
        if now_s < circuit.probe_at_s:
            return Outcome.HELD
        if not circuit.probed:
            circuit.probed, circuit.opened_at_s = True, now_s
        circuit.probe_at_s = now_s + PROBE_EVERY_S
        self._queues[key] = queue
        return None

    def answered(self, key: str, outcome: Outcome, now_s: float) -> str | None:
        """Note an answer. Returns the queue if it was hanging until now."""
        queue = self._queues.pop(key, None)
        if queue is None:
            return None
        claim = self._overdue.pop(key, None)
        if claim is not None:
            self._late[key] = (claim, queue, outcome, now_s)
        circuit = self._open.pop(queue, None)
        return queue if circuit is not None and circuit.hanging else None

    def connected(self, now_s: float) -> None:
        """Begin anew on another connection: nothing is outstanding, and each open circuit is probed."""
        self._queues.clear()
        self._overdue.clear()
        for circuit in self._open.values():
            circuit.opened_at_s = circuit.probe_at_s = now_s
            circuit.probed = False
