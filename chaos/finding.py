"""The verdict on one invariant: its figures, and each violation with what it is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Violation:
    """One thing that must not be. subject: an x-retry-id or a body's digest, by which to find its history."""

    what: str
    subject: str | None = None


@dataclass(frozen=True)
class Finding:
    """figures: what was counted, in the order to print it. violations: empty if the invariant holds."""

    invariant: str
    title: str
    figures: Mapping[str, float | int | str] = field(default_factory=dict)
    violations: Sequence[Violation] = ()

    @property
    def line(self) -> str:
        """One line for people."""
        figures = ", ".join(f"{name} {_shown(value)}" for name, value in self.figures.items())
        verdict = f"VIOLATED {len(self.violations):,} times" if self.violations else "holds"
        return f"{self.invariant:<4}{verdict:<12} {self.title}: {figures}"


def _shown(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else value
