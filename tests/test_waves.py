"""When the broker's answers are taken out of a batch; times are virtual."""

import asyncio
from collections.abc import Sequence

from retry_scheduler.broker.confirms import ConfirmBatch, Outcome
from retry_scheduler.broker.waves import QUIET_S, WAVE_S, wave_complete
from tests.virtual_time import pass_time, run_in_virtual_time

ALIKE_S = 1e-6


def waited_s(size: int, answered_at_s: Sequence[float], *, settled_before: int = 0) -> float:
    """Return how long a wave of `size` publications takes, whose answers come at the times given."""

    async def main() -> float:
        batch = ConfirmBatch(size)
        for place in range(settled_before):
            batch.settle(place, Outcome.HELD)

        async def answer() -> None:
            came_s = 0.0
            for place, at_s in enumerate(answered_at_s, settled_before):
                await pass_time(at_s - came_s)
                came_s = at_s
                batch.settle(place, Outcome.CONFIRMED)

        loop = asyncio.get_running_loop()
        began_s = loop.time()
        answering = asyncio.create_task(answer())
        await wave_complete(batch)
        took_s = loop.time() - began_s
        answering.cancel()
        return took_s

    return run_in_virtual_time(main())


def test_a_batch_that_is_answered_whole_is_taken_with_the_last_answer() -> None:
    assert abs(waited_s(3, [0.001, 0.015, 0.03]) - 0.03) < ALIKE_S


def test_what_has_been_answered_does_not_wait_for_a_queue_that_is_slow() -> None:
    assert waited_s(100, [0.001, 0.002, 0.003]) < 0.003 + 2 * QUIET_S + ALIKE_S < WAVE_S
    assert waited_s(100, [], settled_before=1) < QUIET_S + ALIKE_S


def test_answers_that_keep_coming_are_taken_together_now_and_then() -> None:
    steadily = [0.9 * QUIET_S * number for number in range(1, 50)]
    assert abs(waited_s(100, steadily) - WAVE_S) < ALIKE_S


def test_where_nothing_is_answered_the_caller_looks_after_a_while() -> None:
    assert abs(waited_s(5, []) - WAVE_S) < ALIKE_S
