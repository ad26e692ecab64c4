"""An event loop whose clock is moved by hand: what takes hours runs in no time, and nothing is ever late."""

import asyncio
import time
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar

Result = TypeVar("Result")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Jumps to the next timer as soon as nothing else is to be done. No I/O."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 1000.0

    def time(self) -> float:
        """The virtual time in seconds."""
        return self._now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now_s = max(self._now_s, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


async def pass_time(seconds: float) -> None:
    """Let so much virtual time pass. It takes none, and whatever is due in it has happened afterwards."""
    await asyncio.sleep(seconds)  # noqa: TID251  nobody waits


def run_in_virtual_time(main: Coroutine[Any, Any, Result], *modules: Any) -> Result:
    """Run `main` to its end and return its result; in `modules` the monotonic clock is the virtual one."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        for module in modules:
            module.time = SimpleNamespace(monotonic=loop.time)
        try:
            return runner.run(main)
        finally:
            for module in modules:
                module.time = time
