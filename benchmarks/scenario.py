"""What a scenario is: it measures, and it says what it has measured in rows of one table."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from benchmarks.bed import Bed

Figures = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How much to measure. short: just enough to see that every figure can be produced."""

    short: bool = False
    rounds: int = 3
    horizon_minutes: int = 10
    soak_minutes: int = 30

    def scaled(self, full: int, short: int) -> int:
        """Return one of two sizes."""
        return short if self.short else full

    @property
    def repetitions(self) -> int:
        """How often everything is measured, in turns."""
        return 1 if self.short else self.rounds


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    who: str
    value: str
    beside: str = ""


@dataclass(frozen=True)
class Scenario:
    """One figure or a few that are measured together.

    measure: takes running servers, and returns what goes into the results, made of dicts, lists,
    numbers and text. rows: makes lines of the report from it. by_name_only: too long for a run of
    everything.
    """

    name: str
    title: str
    measure: Callable[[Bed, Options], Coroutine[Any, Any, Figures]]
    rows: Callable[[Figures], list[Row]]
    by_name_only: bool = False


def say(text: str) -> None:
    """Tell whoever is waiting what goes on."""
    print(f"      {text}", flush=True)
