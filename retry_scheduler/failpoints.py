"""Names the moments at which a crash would matter, so that a test can cause one exactly there.

The service says when it comes to such a point, and nobody hears it: a listener is put here by the
tests' own launcher alone, which no installation has. So there is nothing that could be switched on
by mistake, neither a setting nor a variable, and nothing here that kills, freezes or delays.

What a crash at each point means stands in docs/data_flow.md.
"""

from collections.abc import Callable
from typing import Literal

Point = Literal[
    # In: from the queue to the table.
    "before_store",  # a batch has been checked
    "before_quarantine",  # its good requests are stored, its malformed ones are not
    "before_ack",  # everything is committed, the broker does not know
    # Out: from the table to the queue.
    "after_claim",  # the rows are lent to us
    "before_publish",  # and were found to be still ours
    "before_confirm",  # the broker's answer has come, and is not noted
    "after_confirm",  # it is noted, and not in the table
    "after_settle",  # it is in the table, and we have not looked at the answer
    "before_release",  # what came back is not given back
    # The same for malformed input on its way to manual review.
    "after_quarantine_claim",
    "after_quarantine_confirm",
    "after_quarantine_settle",
    # The register of instances.
    "before_beat",
    "before_burial",  # another instance seems to have stopped
    # SIGTERM.
    "while_stopping",  # no more is claimed, something may be in hand
    "before_leaving",  # everything is settled, the register still has us
]

_listener: Callable[[Point], None] | None = None


def reach(point: Point) -> None:
    """Say that the work has come to `point`: once for a batch or an answer, never for each message."""
    if _listener is not None:
        _listener(point)


def listen(listener: Callable[[Point], None]) -> None:
    """Have `listener` called at every point from now on. What it raises comes out at the point."""
    global _listener  # noqa: PLW0603  one process has one set of crash windows
    _listener = listener
