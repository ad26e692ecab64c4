"""The hand: half of it is claimed once that is free, and what is held up keeps nobody else waiting."""

from itertools import count

from retry_scheduler.hand import (
    CLAIM_BYTES,
    CLAIM_ROWS,
    MAX_ALONE_IN_HAND,
    MAX_BYTES_IN_HAND,
    MAX_IN_HAND,
    MORE_IN_HAND,
    Hand,
    parted,
)
from retry_scheduler.messages import ClaimedRetry
from retry_scheduler.repository import ANY_BYTES
from retry_scheduler.suspicion import ALONE_AFTER
from retry_scheduler.transfer import LARGE_BYTES
from tests.factories import new_id

_ids = count(1)


def row(*, claims: int = 1, row_id: int = 0, size: int = 4, unsettled: int = 1) -> ClaimedRetry:
    return ClaimedRetry(
        row_id or next(_ids),
        claims,
        new_id(),
        "orders",
        None,
        0,
        3,
        0,
        unsettled,
        None,
        None,
        b"",
        size,
        0.0,
        True,
    )


def rows(number: int, *, size: int = 4, unsettled: int = 1) -> list[ClaimedRetry]:
    return [row(size=size, unsettled=unsettled) for _ in range(number)]


def test_half_a_hand_is_claimed_as_soon_as_it_is_free() -> None:
    hand = Hand()
    first, second = rows(CLAIM_ROWS), rows(CLAIM_ROWS)
    hand.take(first)
    assert hand.room(slow=0) == CLAIM_ROWS
    hand.take(second)
    assert hand.room(slow=0) == 0
    for task in first[1:]:
        hand.put_down(task)
    assert hand.room(slow=0) == 0
    hand.put_down(first[0])
    assert hand.room(slow=0) == CLAIM_ROWS
    assert set(hand.ids) == {task.id for task in second}


def test_one_row_that_is_held_up_does_not_keep_two_batches_from_overlapping() -> None:
    hand = Hand()
    hand.take(rows(1))
    hand.take(rows(CLAIM_ROWS))

    assert hand.room(slow=0) == 0
    assert hand.room(slow=1) == CLAIM_ROWS


def test_beside_a_hand_full_of_what_is_held_up_the_others_have_a_little_more() -> None:
    hand = Hand()
    hand.take(rows(MAX_IN_HAND))

    assert hand.room(slow=0) == 0
    assert hand.room(slow=MAX_IN_HAND) == MORE_IN_HAND // 2
    hand.take(rows(MORE_IN_HAND))
    assert hand.room(slow=MAX_IN_HAND) == 0


def test_a_hand_that_is_fuller_than_usual_has_no_room_for_probes() -> None:
    hand = Hand()
    hand.take(rows(MAX_IN_HAND + 1))

    assert hand.room_for_probes() == 0


def test_of_what_travels_alone_a_few_are_kept_and_the_rest_queues_up() -> None:
    hand = Hand()
    alone = rows(MAX_ALONE_IN_HAND + 5, unsettled=ALONE_AFTER + 1)
    usual = rows(3)

    parts = parted([*alone, *usual], hand.room_alone)
    hand.take([*alone, *usual])

    assert parts.batches == [usual, alone[:MAX_ALONE_IN_HAND]]
    assert parts.to_queue_up == alone[MAX_ALONE_IN_HAND:]
    assert hand.room_alone == 0
    for task in alone:
        hand.put_down(task)
    assert hand.room_alone == MAX_ALONE_IN_HAND


def test_each_large_payload_goes_by_itself_and_keeps_only_large_ones_waiting() -> None:
    hand = Hand()
    large, usual = rows(2, size=CLAIM_BYTES), rows(3)
    assert hand.limit_payload_bytes == ANY_BYTES

    parts = parted([*large, *usual], hand.room_alone)
    hand.take([*large, *usual])

    assert parts.batches == [usual, [large[0]], [large[1]]]
    assert hand.limit_payload_bytes == LARGE_BYTES
    assert hand.room(slow=0) == CLAIM_ROWS
    hand.put_down(large[0])
    assert hand.limit_payload_bytes == ANY_BYTES


def test_as_many_bytes_as_may_be_in_memory_leave_no_room() -> None:
    hand = Hand()
    hand.take(rows(MAX_BYTES_IN_HAND // LARGE_BYTES, size=LARGE_BYTES))
    assert hand.room(slow=0) == CLAIM_ROWS

    hand.take(rows(1))

    assert (hand.room(slow=0), hand.room_for_probes()) == (0, 0)


def test_a_connection_is_tried_with_one_row_then_with_as_many_as_there_are() -> None:
    hand = Hand()
    assert hand.room_for_probes() == 1
    hand.take(rows(3))
    assert hand.room_for_probes() == 3


def test_a_row_that_was_claimed_anew_before_its_answer_came_stays_in_hand() -> None:
    hand = Hand()
    first = row(claims=1, row_id=7)
    again = row(claims=2, row_id=7)
    hand.take([first])
    hand.take([again])

    hand.put_down(first)
    assert set(hand.ids) == {7}
    hand.put_down(again)
    assert len(hand) == 0
