"""The confirm ledger: which publications of one channel are outstanding, and what became of each.

Pure: no clock, no network. The broker numbers publications from 1 and answers in any order, one at
a time or "this one and all before it". A returned message is confirmed too, right after its
return, so a return must be noted under a key of ours: the header x-retry-id.

States of a publication: outstanding -> confirmed | returned | refused, or unknown if the channel
closes first (suspect if the broker closed it over something that was sent, too large if it said that it
was this one, overdue if only this one is not answered). Unknown may have been delivered: it is published
again later under the same key.
"""

import asyncio
from collections.abc import Callable
from enum import Enum

from retry_scheduler import failpoints


class Outcome(Enum):
    """What became of one publication."""

    CONFIRMED = "confirmed"
    RETURNED = "returned"  # no such queue; certainly not delivered
    REFUSED = "refused"  # the broker said no (nack); certainly not delivered
    UNKNOWN = "unknown"  # sent, and no answer will come; perhaps delivered
    OVERDUE = "overdue"  # unknown yet, while the broker answers: its queue is slow or hangs
    HELD = "held"  # not sent now, since its queue hangs; see `breaker`
    SUSPECT = "suspect"  # unknown, and perhaps what made the broker close the channel
    TOO_LARGE = "too large"  # certainly not delivered: the broker has said so of its size
    NOT_SENT = "not sent"  # certainly not delivered, and not the message's fault
    UNSENDABLE = "unsendable"  # certainly not delivered: AMQP cannot carry it


class ConfirmBatch:
    """Publications that somebody waits for together; `done` is set once every outcome is known."""

    def __init__(self, size: int) -> None:
        self.outcomes: list[Outcome | None] = [None] * size
        self._new: list[tuple[int, Outcome]] = []
        self.open = size  # how many have no outcome yet
        self.done: asyncio.Event = asyncio.Event()
        if size == 0:
            self.done.set()

    @property
    def has_new(self) -> bool:
        """Whether something has been settled since the last call of `take_new`."""
        return bool(self._new)

    def settle(self, place: int, outcome: Outcome) -> None:
        """Note the outcome of the publication at `place`; only the first one counts."""
        if self.outcomes[place] is None:
            self.outcomes[place] = outcome
            self._new.append((place, outcome))
            self.open -= 1
            if self.open == 0:
                self.done.set()

    def settle_rest(self, outcome: Outcome) -> None:
        """Give every publication that is still open the same outcome; a later answer changes nothing."""
        for place in self.open_places():
            self.settle(place, outcome)

    def open_places(self) -> list[int]:
        """Return the places of the publications that have no outcome yet."""
        return [place for place, known in enumerate(self.outcomes) if known is None]

    def take_new(self) -> list[tuple[int, Outcome]]:
        """Return (place, outcome) of what has been settled since the last call."""
        new, self._new = self._new, []
        return new


class ConfirmLedger:
    """The outstanding publications of one channel. Every call costs O(1) for each one it settles."""

    def __init__(self) -> None:
        self._next_tag = 1
        # Insertion order is the order of the tags: "this and all before" takes from the front.
        self._outstanding: dict[int, tuple[ConfirmBatch, int, str, int]] = {}
        self._tags: dict[str, int] = {}
        self._returned: set[int] = set()
        # Told the key and the outcome of each answer, also of one that nobody waits for any more.
        self.on_answer: Callable[[str, Outcome], None] | None = None

    def __len__(self) -> int:
        return len(self._outstanding)

    def sent(self, batch: ConfirmBatch, place: int, key: str, body_bytes: int) -> None:
        """Note that the publication at `place` was handed to the channel, under `key`."""
        self._outstanding[self._next_tag] = (batch, place, key, body_bytes)
        self._tags[key] = self._next_tag
        self._next_tag += 1

    def returned(self, key: str | None) -> None:
        """Note that the broker found no queue for `key`. Its confirm, which follows, will say so."""
        tag = self._tags.get(key) if key is not None else None
        if tag is not None:
            self._returned.add(tag)

    def answered(self, tag: int, *, multiple: bool, accepted: bool) -> None:
        """Settle `tag`, and all before it if `multiple`. A tag that is not outstanding changes nothing."""
        failpoints.reach("before_confirm")
        if not multiple:
            if tag in self._outstanding:
                self._settle(tag, accepted)
            return
        # Tag 0 means all; a tag above the last one sent settles what is there.
        while self._outstanding:
            first = next(iter(self._outstanding))
            if tag and first > tag:
                break
            self._settle(first, accepted)

    def close(self, outcome: Outcome = Outcome.UNKNOWN) -> int:
        """The channel is gone: what is outstanding stays unknown, or suspect. Return how many that were."""
        count = len(self._outstanding)
        for batch, place, _, _ in self._outstanding.values():
            batch.settle(place, outcome)
        self._forget()
        return count

    def close_over_size(self, limit_bytes: int) -> None:
        """The broker has closed the channel over the first body above `limit_bytes`.

        It handles a channel's messages one after the other, and none after that one. If none is above,
        it means something else, and all are suspect.
        """
        outcome = Outcome.UNKNOWN
        if all(body_bytes <= limit_bytes for _, _, _, body_bytes in self._outstanding.values()):
            outcome = Outcome.SUSPECT
        for batch, place, _, body_bytes in self._outstanding.values():
            if outcome is Outcome.UNKNOWN and body_bytes > limit_bytes:
                batch.settle(place, Outcome.TOO_LARGE)
                outcome = Outcome.NOT_SENT
            else:
                batch.settle(place, outcome)
        self._forget()

    def _forget(self) -> None:
        self._outstanding.clear()
        self._tags.clear()
        self._returned.clear()

    def _settle(self, tag: int, accepted: bool) -> None:
        batch, place, key, _ = self._outstanding.pop(tag)
        if self._tags.get(key) == tag:
            del self._tags[key]
        if tag in self._returned:
            self._returned.discard(tag)
            outcome = Outcome.RETURNED
        else:
            outcome = Outcome.CONFIRMED if accepted else Outcome.REFUSED
        batch.settle(place, outcome)
        if self.on_answer is not None:
            self.on_answer(key, outcome)
