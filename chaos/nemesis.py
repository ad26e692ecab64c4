"""Carries out a schedule: every strike in its own time, and everything healed at the end.

Each fault is in the operation log from before it begins until after it is healed, so that whatever it
causes lies inside.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Sequence

from chaos.faults import FAULTS
from chaos.oplog import OperationLog
from chaos.schedule import OF_ONE, Strike, target_of
from chaos.stage import Stage


class Nemesis:
    """One schedule against one stage."""

    def __init__(self, stage: Stage, log: OperationLog) -> None:
        self._stage = stage
        self._log = log
        self._problems: list[Exception] = []
        self._locks: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)

    def run(self, strikes: Sequence[Strike]) -> None:
        """Return when the last strike is over and everything is healed.

        Raises ExceptionGroup if a fault could not be inflicted or healed: then the trial proves nothing.
        """
        began = time.monotonic()
        threads = []
        for strike in sorted(strikes):
            time.sleep(max(began + strike.at_s - time.monotonic(), 0))
            target = target_of(strike.fault)
            # On a busy machine a server may still be starting when it should be struck again.
            lock = self._locks[target, strike.instance if target in OF_ONE else 0]
            thread = threading.Thread(
                target=self._strike, args=(strike, lock), name=strike.fault, daemon=True
            )
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()
        self._stage.heal_all()
        if self._problems:
            raise ExceptionGroup("the nemesis failed", self._problems)

    def _strike(self, strike: Strike, one_at_a_time: threading.Lock) -> None:
        with one_at_a_time:
            self._break_and_heal(strike)

    def _break_and_heal(self, strike: Strike) -> None:
        fields = {"fault": strike.fault, "target": target_of(strike.fault), "lasts_s": strike.lasts_s}
        if fields["target"] in OF_ONE:
            fields["instance"] = self._stage.instances[strike.instance].name
        operation = self._log.new_operation()
        self._log.write("fault", "invoke", operation=operation, **fields)
        try:
            heal = FAULTS[strike.fault](self._stage, strike)
            time.sleep(strike.lasts_s)
            heal()
        except Exception as error:  # seen by run(), which ends the trial
            self._problems.append(error)
        self._log.write("fault", "ok", operation=operation, **fields)
