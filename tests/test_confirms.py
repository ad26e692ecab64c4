"""The confirm ledger against a simple model: whatever the broker answers, each message is settled once."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from retry_scheduler.broker.confirms import ConfirmBatch, ConfirmLedger, Outcome


@dataclass
class Sent:
    """What the model knows of one publication."""

    batch: ConfirmBatch
    place: int
    key: str
    body_bytes: int
    returned: bool = False
    outcome: Outcome | None = None  # what the broker said
    seen: Outcome | None = None  # what whoever waits was told


class Ledger(RuleBasedStateMachine):
    """Calls the ledger as the broker and the publisher do, in any order, and keeps a model beside it."""

    @initialize()
    def open_channel(self) -> None:
        self.ledger = ConfirmLedger()
        self.sent: list[Sent] = []  # number n of the broker is sent[n - 1]
        self.batches: list[ConfirmBatch] = []
        self.taken: list[list[tuple[int, Outcome]]] = []
        self.answers: list[tuple[str, Outcome]] = []
        self.told: list[tuple[str, Outcome]] = []
        self.ledger.on_answer = lambda key, outcome: self.told.append((key, outcome))

    def outstanding(self) -> list[Sent]:
        return [one for one in self.sent if one.outcome is None]

    def keys_to_use_again(self) -> list[str]:
        """Keys that nobody waits for; if there are any, those that the broker may still answer."""
        waited_for = {one.key for one in self.sent if one.seen is None}
        given_up = {one.key for one in self.outstanding()} - waited_for
        return sorted(given_up or {one.key for one in self.sent} - waited_for)

    def latest(self, *, outstanding: bool) -> list[Sent]:
        """The last one sent under each key, if it is outstanding, or if it is not."""
        latest = {one.key: one for one in self.sent}.values()
        return [one for one in latest if (one.outcome is None) == outstanding]

    @rule(size=st.integers(min_value=0, max_value=5), data=st.data())
    def send_batch(self, size: int, data: st.DataObject) -> None:
        """Of publications that nobody waits for any more, some are sent again under the same key."""
        batch = ConfirmBatch(size)
        self.batches.append(batch)
        self.taken.append([])
        for place in range(size):
            key = data.draw(st.sampled_from([f"{len(self.sent)}:0", *self.keys_to_use_again()]))
            sent = Sent(batch, place, key, data.draw(st.integers(min_value=0, max_value=3)))
            self.ledger.sent(batch, place, sent.key, sent.body_bytes)
            self.sent.append(sent)

    @precondition(lambda self: self.latest(outstanding=True))
    @rule(data=st.data())
    def return_one(self, data: st.DataObject) -> None:
        """Returns come in the order of sending, so never for the earlier one of two under the same key."""
        sent = data.draw(st.sampled_from(self.latest(outstanding=True)))
        self.ledger.returned(sent.key)
        sent.returned = True

    @rule(key=st.sampled_from([None, "", "never sent"]))
    def return_what_was_never_sent(self, key: str | None) -> None:
        self.ledger.returned(key)

    @precondition(lambda self: self.latest(outstanding=False))
    @rule(data=st.data())
    def return_what_is_settled(self, data: st.DataObject) -> None:
        sent = data.draw(st.sampled_from(self.latest(outstanding=False)))
        self.ledger.returned(sent.key)

    @rule(data=st.data(), accepted=st.booleans())
    def answer_one(self, data: st.DataObject, accepted: bool) -> None:
        tag = data.draw(st.integers(min_value=1, max_value=len(self.sent) + 3))
        self.ledger.answered(tag, multiple=False, accepted=accepted)
        if tag <= len(self.sent) and self.sent[tag - 1].outcome is None:
            self.settle(self.sent[tag - 1], accepted)

    @rule(data=st.data(), accepted=st.booleans())
    def answer_all_up_to(self, data: st.DataObject, accepted: bool) -> None:
        tag = data.draw(st.integers(min_value=0, max_value=len(self.sent) + 3))
        self.ledger.answered(tag, multiple=True, accepted=accepted)
        for sent in self.sent[: tag or None]:
            if sent.outcome is None:
                self.settle(sent, accepted)

    @rule(outcome=st.sampled_from([Outcome.UNKNOWN, Outcome.SUSPECT]))
    def lose_channel(self, outcome: Outcome) -> None:
        lost = self.outstanding()
        assert self.ledger.close(outcome) == len(lost)
        for sent in lost:
            self.note(sent, outcome)

    @rule(limit_bytes=st.integers(min_value=0, max_value=3))
    def lose_channel_over_a_size(self, limit_bytes: int) -> None:
        """The broker handles one after the other: the first that is too large, and none after it."""
        lost = self.outstanding()
        guilty = next((number for number, sent in enumerate(lost) if sent.body_bytes > limit_bytes), None)
        self.ledger.close_over_size(limit_bytes)
        for number, sent in enumerate(lost):
            if guilty is None:
                self.note(sent, Outcome.SUSPECT)
            elif number == guilty:
                self.note(sent, Outcome.TOO_LARGE)
            else:
                self.note(sent, Outcome.UNKNOWN if number < guilty else Outcome.NOT_SENT)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def give_up_a_batch(self, data: st.DataObject) -> None:
        """Whoever waits gives up; the ledger does not know, and a late answer changes nothing."""
        batch = data.draw(st.sampled_from(self.batches))
        batch.settle_rest(Outcome.OVERDUE)
        for sent in self.sent:
            if sent.batch is batch and sent.seen is None:
                sent.seen = Outcome.OVERDUE

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def take_what_is_new(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(min_value=0, max_value=len(self.batches) - 1))
        self.taken[place] += self.batches[place].take_new()
        assert self.batches[place].take_new() == []

    def settle(self, sent: Sent, accepted: bool) -> None:
        answer = Outcome.CONFIRMED if accepted else Outcome.REFUSED
        outcome = Outcome.RETURNED if sent.returned else answer
        self.answers.append((sent.key, outcome))
        self.note(sent, outcome)

    def note(self, sent: Sent, outcome: Outcome) -> None:
        sent.outcome = outcome
        sent.seen = sent.seen or outcome

    def teardown(self) -> None:
        """Each outcome was handed out once, and none was forgotten."""
        for batch, taken in zip(self.batches, self.taken, strict=True):
            handed_out = taken + batch.take_new()
            expected = [(place, outcome) for place, outcome in enumerate(batch.outcomes) if outcome]
            assert sorted(handed_out, key=lambda entry: entry[0]) == expected

    @invariant()
    def both_agree(self) -> None:
        for sent in self.sent:
            assert sent.batch.outcomes[sent.place] is sent.seen
        for batch in self.batches:
            assert batch.done.is_set() == all(batch.outcomes)
        assert len(self.ledger) == len(self.outstanding())
        assert self.told == self.answers


Ledger.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestLedger = Ledger.TestCase


def test_the_first_outcome_of_a_publication_counts() -> None:
    batch = ConfirmBatch(1)

    batch.settle(0, Outcome.UNSENDABLE)
    batch.settle(0, Outcome.CONFIRMED)

    assert batch.outcomes == [Outcome.UNSENDABLE]


def test_a_late_answer_to_the_first_of_two_under_a_key_does_not_hide_the_return_of_the_second() -> None:
    """The first was given up as overdue. Forgetting the key with it would count the second as delivered."""
    ledger, given_up, again = ConfirmLedger(), ConfirmBatch(1), ConfirmBatch(1)
    ledger.sent(given_up, 0, "same", 1)
    given_up.settle_rest(Outcome.OVERDUE)
    ledger.sent(again, 0, "same", 1)

    ledger.answered(1, multiple=False, accepted=True)
    ledger.returned("same")
    ledger.answered(2, multiple=False, accepted=True)

    assert (given_up.outcomes, again.outcomes) == ([Outcome.OVERDUE], [Outcome.RETURNED])


def test_a_key_used_again_while_the_first_is_outstanding_marks_the_later_one() -> None:
    """It does not happen within one channel; if it did, one of the two must still count as returned."""
    ledger, batch = ConfirmLedger(), ConfirmBatch(2)
    ledger.sent(batch, 0, "same", 1)
    ledger.sent(batch, 1, "same", 1)

    ledger.returned("same")
    ledger.answered(2, multiple=True, accepted=True)

    assert batch.outcomes == [Outcome.CONFIRMED, Outcome.RETURNED]
    assert len(ledger) == 0
