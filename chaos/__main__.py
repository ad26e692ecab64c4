"""`make chaos`: breaks everything for some minutes, and says what became of every message.

Exit codes: 0 every invariant holds, 1 one is violated, 69 PostgreSQL or RabbitMQ is not installed.
"""

import argparse
import random
import sys
from pathlib import Path

from chaos.bed import bed
from chaos.checker import check, holds
from chaos.history import History
from chaos.reading import read_history
from chaos.report import details, keep, summary
from chaos.schedule import Strike, random_schedule
from chaos.trial import Plan, run_trial
from retry_scheduler.demo.processes import ServerMissing

SERVER_MISSING = 69

WARM_UP_S = 15.0

# Each dependency's hardest faults, two or three of them at once, in less than a minute; the same every time.
SHORT = (
    Strike(0.0, "kill instance", 0.5, 0),
    Strike(3.0, "kill broker", 1.0),
    Strike(3.5, "freeze instance", 4.0, 1),
    Strike(13.0, "kill database", 1.0),
    Strike(17.0, "lock table", 2.5),
    Strike(21.0, "broker alarm", 2.0),
    Strike(22.0, "restart instance", 0.0, 0),
    Strike(26.0, "cut broker connections"),
    Strike(27.0, "cut database connections"),
    Strike(28.0, "full queue", 2.0),
    Strike(28.5, "silence database link", 4.0, 0),
    Strike(29.0, "throttle broker link", 3.0, 1),
    Strike(33.0, "read only", 1.5),
    Strike(33.5, "deafen broker link", 2.0, 0),
    Strike(34.0, "kill at failpoint", 0.5, 1),
)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="make chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, help="of everything that is drawn; a new one unless given")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--again", type=Path, metavar="FOLDER", help="only check what a trial has left there")
    parser.add_argument("--short", action="store_true", help="a fixed schedule of half a minute")
    given = parser.parse_args()
    if given.again:
        return _judge(read_history(given.again), given.seed or 0)
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    if given.short:
        plan = Plan(seed, SHORT, given.instances, warm_up_s=2.0)
    else:
        strikes = random_schedule(seed, given.minutes * 60 - WARM_UP_S, given.instances)
        plan = Plan(seed, strikes, given.instances, warm_up_s=WARM_UP_S)
    print(f"chaos: seed {seed}, {given.instances} instances, {len(plan.strikes)} faults", flush=True)
    try:
        return _run(plan)
    except ServerMissing as missing:
        print(f"chaos: {missing}", file=sys.stderr)
        return SERVER_MISSING


def _run(plan: Plan) -> int:
    with bed() as servers:
        folder = servers.folder / "trial"
        folder.mkdir()
        history = run_trial(servers, plan, folder)
        code = _judge(history, plan.seed)
        if code:
            kept = keep(folder, plan.seed)
            print(f"chaos: repeat it with SEED={plan.seed}; all logs are in {kept}")
        return code


def _judge(history: History, seed: int) -> int:
    findings = check(history)
    print(summary(findings, history, seed))
    if holds(findings):
        return 0
    print(details(findings, history))
    return 1


if __name__ == "__main__":
    sys.exit(main())
