"""The scenarios, in the order of the report."""

from benchmarks.scenario import Scenario
from benchmarks.scenarios import (
    archive,
    backlog,
    burst,
    defaults,
    horizon,
    idle,
    instances,
    poison,
    promise,
    punctual,
    soak,
)

ALL: list[Scenario] = [
    promise.SCENARIO,
    burst.SCENARIO,
    defaults.SCENARIO,
    punctual.STEADY,
    punctual.FAST,
    backlog.SCENARIO,
    instances.SCENARIO,
    poison.SCENARIO,
    idle.SCENARIO,
    horizon.SCENARIO,
    soak.SCENARIO,
    archive.SCENARIO,
]
