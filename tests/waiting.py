"""Waits for what will become true in its own time, instead of sleeping and hoping."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeVar, overload

Result = TypeVar("Result")


@overload
async def eventually(
    condition: Callable[[], Awaitable[Result]], *, within: timedelta = ..., every: timedelta = ...
) -> Result: ...


@overload
async def eventually(
    condition: Callable[[], Result], *, within: timedelta = ..., every: timedelta = ...
) -> Result: ...


async def eventually(
    condition: Callable[[], object],
    *,
    within: timedelta = timedelta(seconds=5),
    every: timedelta = timedelta(milliseconds=20),
) -> object:
    """Call `condition` again and again until what it returns is true, and return that.

    condition: plain or async. An exception counts as "not yet".
    Raises AssertionError after `within`, with the last value or from the last exception.
    """
    started = time.monotonic()
    outcome = "it did not return once"
    last_error: Exception | None = None
    try:
        async with asyncio.timeout(within.total_seconds()):
            while True:
                try:
                    answer = condition()
                    result = await answer if inspect.isawaitable(answer) else answer
                    outcome, last_error = f"the last value was {result!r}", None
                    if result:
                        return result
                except Exception as error:
                    outcome, last_error = f"the last try raised {error!r}", error
                await asyncio.sleep(every.total_seconds())  # noqa: TID251  so that nobody else has to
    except TimeoutError:
        waited = f"{time.monotonic() - started:.1f} s"
        raise AssertionError(f"{_name_of(condition)} not true after {waited}; {outcome}") from last_error


def _name_of(condition: Callable[[], object]) -> str:
    try:
        source = inspect.getsource(condition).strip()
    except (OSError, TypeError):
        return repr(condition)
    return source if "\n" not in source else getattr(condition, "__qualname__", repr(condition))
