"""`make bench`: measures the service on private servers, with --all beside its yardsticks, and reports.

Everything shares this machine: both servers, upstream, consumer, and whoever is measured. So
absolute numbers are context; what counts are ratios of medians from rounds taken in turns.
"""

import argparse
import sys
import traceback
from contextlib import ExitStack, nullcontext
from pathlib import Path

import uvloop

from benchmarks.bed import bed
from benchmarks.report import RESULTS, keep, machine, table, throwaway
from benchmarks.scenario import Figures, Options, Scenario
from benchmarks.scenarios import ALL, promise


def main() -> int:
    """Run what the command line asks for. Returns 1 if a figure could not be produced."""
    options, chosen, target = _command_line()
    measured: dict[str, Figures] = {}
    failed = []
    with ExitStack() as whole_run:
        # Fresh servers for each scenario, so that none finds what another has left; in a short run
        # the time to start them counts for more.
        shared = whole_run.enter_context(bed()) if options.short else None
        for scenario in chosen:
            print(f"bench: {scenario.name}: {scenario.title}", flush=True)
            try:
                with nullcontext(shared) if shared else bed() as at:
                    measured[scenario.name] = uvloop.run(scenario.measure(at, options))
            except Exception:  # the other figures can still be had
                traceback.print_exc()
                failed.append(scenario.name)
                continue
            keep(target, scenario.name, measured[scenario.name], options)
    on = machine()
    print(f"\n{on['processor']}, {on['cores']} cores shared by everything\n")
    print(table(chosen, measured))
    for name in failed:
        print(f"bench: {name} could not be measured", file=sys.stderr)
    return 1 if failed else 0


def _command_line() -> tuple[Options, list[Scenario], Path]:
    names = [scenario.name for scenario in ALL]
    parser = argparse.ArgumentParser(prog="make bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="everything but the long ones: about 35 minutes")
    parser.add_argument("--only", help=f"some of {','.join(names)}")
    parser.add_argument("--short", action="store_true", help="small sizes: shows that all figures can be had")
    parser.add_argument("--rounds", type=int, default=Options.rounds, help="rounds taken in turns")
    parser.add_argument("--soak-minutes", type=int, default=Options.soak_minutes)
    parser.add_argument("--horizon-minutes", type=int, default=Options.horizon_minutes)
    given = parser.parse_args()
    everything = given.all or given.short
    wanted = [s.name for s in ALL if not s.by_name_only] if everything else [promise.SCENARIO.name]
    if given.only:
        wanted = given.only.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    options = Options(given.short, given.rounds, given.horizon_minutes, given.soak_minutes)
    # Only a measurement beside the yardsticks goes into the performance page.
    for_the_page = (given.all or given.only) and not given.short
    return options, [s for s in ALL if s.name in wanted], RESULTS if for_the_page else throwaway()


if __name__ == "__main__":
    sys.exit(main())
