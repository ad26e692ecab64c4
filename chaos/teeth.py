"""`make chaos-teeth`: does the chaos test bite? Each broken build must be caught, and the whole one must not.

Every break has a form: a short trial whose faults suit it. The same form is run on the unbroken build,
because a checker that complains about everything also catches everything.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chaos.bed import Bed, bed
from chaos.checker import check
from chaos.finding import Finding
from chaos.instance import COMMAND
from chaos.report import details
from chaos.requests import MIX
from chaos.schedule import Strike
from chaos.trial import Plan, run_trial

SEED = 1
WHOLE = "whole"
NO_FAULT_S = 5.0


@dataclass(frozen=True)
class Form:
    """A short trial. after_s: load after the last fault."""

    strikes: Sequence[Strike] = ()
    after_s: float = 2.0
    mix: Mapping[str, float] = field(default_factory=lambda: MIX)


QUIET_LOAD = Form(after_s=NO_FAULT_S)
# Requests arrive while they cannot be stored, and then the process dies with them.
DEATH_IN_OUTAGE = Form(
    tuple(
        strike
        for at_s in (0.0, 4.0, 8.0)
        for strike in (
            Strike(at_s, "stop database", 2.0),
            Strike(at_s + 1.0, "kill instance", 0.1, 0),
            Strike(at_s + 1.1, "kill instance", 0.1, 1),
        )
    )
)
FREEZES = Form(tuple(Strike(at_s, "freeze instance", 6.0, 0) for at_s in (0.0, 9.0)))
# The claim waits for the lock when its instance is frozen, and succeeds when nobody sees it.
FREEZES_WHILE_CLAIMING = Form(
    tuple(
        strike
        for at_s in (0.0, 10.0)
        for strike in (
            Strike(at_s, "lock table", 0.9, at_once=True),
            Strike(at_s + 0.5, "freeze instance", 4.8, at_once=True),
        )
    )
)
SMOTHERED = Form((Strike(0.0, "smother broker", 12.0),))
MANY_LOST = {"in step": 0.7, "unroutable": 0.3}
FROZEN_BROKER = Form((Strike(0.0, "freeze broker", 13.0),), after_s=4.0, mix=MANY_LOST)
LOCKS = Form(tuple(Strike(at_s, "lock table", 2.6) for at_s in (0.0, 4.0, 8.0)))
CRASHES = Form(tuple(Strike(at_s, "kill database", 0.3) for at_s in (0.0, 3.0, 6.0, 9.0)))


@dataclass(frozen=True)
class Tooth:
    """One break, by its function in `breaks`, and the form that must catch it."""

    what: str
    function: str
    form: Form


TEETH: Mapping[str, Tooth] = {
    "M1": Tooth("acknowledges before the commit", "acknowledge_before_commit", DEATH_IN_OUTAGE),
    "M2": Tooth("publishes without mandatory", "publish_without_mandatory", QUIET_LOAD),
    "M3": Tooth("takes a returned message for delivered", "take_returned_for_delivered", QUIET_LOAD),
    "M4": Tooth("settles without a fence", "settle_without_a_fence", FREEZES),
    "M5": Tooth("overwrites a stored attempt", "overwrite_stored_attempts", QUIET_LOAD),
    "M6": Tooth("claims without lease and SKIP LOCKED", "claim_without_a_lease", QUIET_LOAD),
    "M7": Tooth("takes silence for a confirm", "take_silence_for_a_confirm", SMOTHERED),
    "M8": Tooth("uses a channel on after a confirm timeout", "reuse_channel_after_timeout", FROZEN_BROKER),
    "M9": Tooth(
        "trusts its leases after it was frozen", "trust_leases_after_a_freeze", FREEZES_WHILE_CLAIMING
    ),
    "M10": Tooth("requeues what is malformed", "requeue_malformed", QUIET_LOAD),
    "M11": Tooth("takes due times from its own, slow clock", "compute_due_times_by_own_clock", QUIET_LOAD),
    "M12": Tooth("swallows errors when it settles", "swallow_errors_when_settling", LOCKS),
    "M13": Tooth("commits asynchronously", "commit_asynchronously", CRASHES),
    "M14": Tooth("decodes base64 leniently", "decode_base64_leniently", QUIET_LOAD),
    "M15": Tooth("matches returns by message_id", "match_returns_by_message_id", LOCKS),
}

# A broken build may never come to rest: that is a finding, and not worth a minute each.
QUIET_WITHIN_S = 15.0


def main() -> int:
    """Run the forms and print the table. Returns 1 if a break was not caught, or the whole build was."""
    parser = argparse.ArgumentParser(prog="make chaos-teeth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help=f"some of {','.join(TEETH)},{WHOLE}")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--verbose", action="store_true", help="show the violations, too")
    given = parser.parse_args()
    chosen = given.only.split(",") if given.only else [*TEETH, WHOLE]
    if unknown := set(chosen) - {*TEETH, WHOLE}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    good = True
    with bed() as servers:
        for name in chosen:
            if name in TEETH:
                tooth = TEETH[name]
                caught = _run(servers, tooth.form, given.seed, tooth.function, verbose=given.verbose)
                good &= bool(caught)
                _say(name, tooth.what, ", ".join(caught) or "NOT CAUGHT")
        for form in _different_forms() if WHOLE in chosen else ():
            complaints = _run(servers, form, given.seed, None, verbose=True)
            good &= not complaints
            faults = ", ".join(dict.fromkeys(strike.fault for strike in form.strikes)) or "no fault"
            _say(WHOLE, faults, ", ".join(complaints) or "clean")
    return 0 if good else 1


def _run(servers: Bed, form: Form, seed: int, function: str | None, *, verbose: bool) -> list[str]:
    """Return the invariants that are violated."""
    folder = servers.folder / f"teeth-{time.monotonic_ns()}"
    folder.mkdir()
    command = COMMAND if function is None else (*COMMAND, function)
    plan = Plan(
        seed,
        form.strikes,
        warm_up_s=1.0,
        after_s=form.after_s,
        quiet_within_s=QUIET_WITHIN_S,
        mix=form.mix,
        command=command,
    )
    history = run_trial(servers, plan, folder)
    findings: list[Finding] = [finding for finding in check(history) if finding.violations]
    if verbose and findings:
        print(details(findings, history), file=sys.stderr)
    return [finding.invariant for finding in findings]


def _different_forms() -> list[Form]:
    forms = [tooth.form for tooth in TEETH.values()]
    return [form for place, form in enumerate(forms) if form not in forms[:place]]


def _say(name: str, what: str, verdict: str) -> None:
    print(f"{name:<7} {what:<55} {verdict}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
