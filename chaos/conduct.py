"""I8 to I11: how the service behaves: honest counters, healing, bounded resources, kept secrets. Pure."""

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

from chaos.duplicates import OVERTAKEN, UNKNOWN, Explanations, is_outage
from chaos.finding import Finding, Violation
from chaos.history import Event, Fault, History, Sample, attempt_of
from chaos.schedule import HORIZON

SCHEDULED = "Retry scheduled"
EXECUTED = "Retry executed successfully"
NOT_DELIVERED = "Retry not delivered - will be tried again"
EXHAUSTED = "Max retries exceeded - moved to manual review"
UNDELIVERABLE = "Retry undeliverable - moved to manual review"
ENDS = (EXECUTED, EXHAUSTED, UNDELIVERABLE)

# Promised; and what a connection that was frozen or cut needs before that, with its confirm timeout.
HEALS_WITHIN_S = 5.0
DETECTION_S = 10.0
QUIET_WITHIN_S = 60.0
# Promised also while an instance dies, but not while a server is away.
LATE_AT_MOST_S = 5.0

# A process holds at most this much of payloads (docs/decisions.md), which come and go.
HELD_KIB = 32 * 1024
GROWTH = 1.2
# Pools grow with the load after an outage, and shrink after minutes.
MORE_FILES = 20

# A counter, and the lines of the log that must be as many.
_COUNTED: dict[str, Callable[[Event], bool]] = {
    "retries_scheduled_total": lambda event: event.message == SCHEDULED,
    "retries_executed_total{success}": lambda event: event.message == EXECUTED,
    "retries_executed_total{failed}": lambda event: (
        event.message == NOT_DELIVERED and event.review_reason is None and event.retry_id is not None
    ),
    "retries_exhausted_total": lambda event: event.message == EXHAUSTED,
    "retry_publications_unknown_total": lambda event: event.message in UNKNOWN,
    "retry_stale_completions_total": lambda event: event.message == OVERTAKEN,
}


def counters_tell_the_truth(history: History) -> Finding:
    """I8: metrics, logs and table agree, and no counter ever falls."""
    explanations = Explanations(history)
    violations: list[Violation] = []
    lines = 0
    for last in _last_samples(history):
        said = [event for event in history.events if event.pid == last.pid]
        for name, counts in _COUNTED.items():
            logged = sum(counts(event) for event in said)
            lines += logged
            if logged != last.metrics.get(name, 0):
                shown = f"{last.instance}: {name} is {last.metrics.get(name, 0):.0f}, its log says {logged}"
                violations.append(Violation(shown))
    violations += _falling(history)
    for row in history.rows:
        told = Counter(event.message for event in history.events_by_id.get(row.retry_id, ()))
        ends = sum(told[end] for end in ENDS)
        if ends > 1:
            violations.append(Violation(f"reported as ended {ends} times", row.retry_id))
        # What a process did in its last moments it may not have said.
        if not told[SCHEDULED] and not explanations.killed_near(row.created_at):
            violations.append(Violation("stored, and no log says so", row.retry_id))
        if not ends and row.finished_at is not None and not explanations.killed_near(row.finished_at):
            violations.append(Violation("ended, and no log says so", row.retry_id))
    figures = {"rows": len(history.rows), "log lines compared with counters": lines}
    return Finding("I8", "counters and logs tell the truth", figures, violations)


def heals(history: History) -> Finding:
    """I9: after each fault the work goes on within seconds, and after the last one everything gets done."""
    violations: list[Violation] = []
    slowest_s = 0.0
    faults = [fault for fault in history.faults if fault.target != HORIZON]
    for fault in faults:
        others = [other for other in faults if other is not fault and other.near(fault.healed, 1.0)]
        if others or fault.healed > history.healed_at:
            continue
        following = bisect(history.delivered_at, fault.healed)
        resumed_at = next(iter(history.delivered_at[following : following + 1]), float("inf"))
        resumed_s = resumed_at - fault.healed - _away_s(faults, fault.healed, resumed_at)
        slowest_s = max(slowest_s, resumed_s)
        if resumed_s > HEALS_WITHIN_S + DETECTION_S:
            violations.append(Violation(f"nothing was delivered for {resumed_s:.1f} s after: {fault.name}"))
    quiet_s = None if history.quiet_at is None else history.quiet_at - history.healed_at
    if quiet_s is None:
        violations.append(Violation(f"never came to rest: {history.left}"))
    elif quiet_s > QUIET_WITHIN_S:
        violations.append(Violation(f"came to rest only after {quiet_s:.1f} s"))
    latest_s = 0.0
    outages = [fault for fault in history.faults if is_outage(fault)]
    for event in history.events:
        late_s = (event.late_ms or 0) / 1000
        if late_s > min(latest_s, LATE_AT_MOST_S) and not _excused(event, outages, history):
            latest_s = max(latest_s, late_s)
            if late_s > LATE_AT_MOST_S:
                violations.append(Violation(f"{late_s:.1f} s late", event.retry_id))
    violations += _out_of_work(faults, history)
    violations += _ended_by_themselves(history)
    violations += [Violation(f"{instance} is not ready at the end") for instance in history.not_ready]
    figures: dict[str, float | int | str] = {
        "faults": len(history.faults),
        "slowest to deliver again, s": slowest_s,
        "latest while both servers work, s": latest_s,
        "all done after, s": "never" if quiet_s is None else quiet_s,
    }
    return Finding("I9", "heals by itself", figures, violations)


def bounded(history: History) -> Finding:
    """I10: memory, files and connections do not grow, and every log line is an event and no accident."""
    warm = [sample for sample in history.samples if sample.when == "warm"]
    end = [sample for sample in history.samples if sample.when == "end"]
    warm_kib = max((sample.rss_kib for sample in warm), default=0)
    warm_files = max((sample.files for sample in warm), default=0)
    violations = [Violation(complaint) for complaint in history.complaints]
    for sample in end if warm else ():
        if sample.rss_kib > warm_kib * GROWTH + HELD_KIB:
            violations.append(Violation(f"{sample.instance} holds {sample.rss_kib} KiB, warm {warm_kib} KiB"))
        if sample.files > warm_files * GROWTH + MORE_FILES:
            violations.append(Violation(f"{sample.instance} has {sample.files} files, warm {warm_files}"))
    if history.connections > history.connections_most:
        violations.append(Violation(f"{history.connections} database connections"))
    figures = {
        "warm MiB": warm_kib // 1024,
        "end MiB": max((sample.rss_kib for sample in end), default=0) // 1024,
        "files": max((sample.files for sample in end), default=0),
        "database connections": history.connections,
        "odd log lines": len(history.complaints),
    }
    return Finding("I10", "resources are bounded", figures, violations)


def secrets_kept(history: History) -> Finding:
    """I11: no password and no payload is in a log, on a page or in a command line."""
    violations = [Violation(leak) for leak in history.leaks]
    return Finding("I11", "secrets are kept", {"leaks": len(violations)}, violations)


def _away_s(faults: Sequence[Fault], began: float, ended: float) -> float:
    """For how long of that time a server was away for everybody, by another fault."""
    away_s = 0.0
    for fault in sorted(faults, key=lambda fault: fault.began):
        if fault.instance is None and is_outage(fault) and fault.began < ended and fault.healed > began:
            away_s += min(fault.healed, ended) - max(fault.began, began)
            began = max(began, fault.healed)
    return away_s


def _out_of_work(faults: Sequence[Fault], history: History) -> Iterator[Violation]:
    """Faults of one instance after which that instance did not deliver again, though nothing else hit it."""
    delivered_at: dict[str | None, list[float]] = defaultdict(list)
    for event in history.events:
        if event.message == EXECUTED:
            delivered_at[history.instance_of.get(event.pid)].append(event.at)
    for fault in faults:
        until = fault.healed + HEALS_WITHIN_S + DETECTION_S
        if fault.instance is None or until > history.healed_at:
            continue
        if any(
            other is not fault
            and other.hits(fault.instance)
            and other.began <= until
            and other.healed >= fault.began
            for other in faults
        ):
            continue
        at = delivered_at[fault.instance]
        if bisect(at, fault.healed) == bisect(at, until):
            yield Violation(f"{fault.instance} has delivered nothing after: {fault.name}")


def _ended_by_themselves(history: History) -> Iterator[Violation]:
    ended = {event.pid for event in history.instance_events if event.what in ("kill", "ended")}
    starts = [event for event in history.instance_events if event.what == "start"]
    last = {event.instance: event.pid for event in starts}
    for event in starts:
        if event.pid not in ended and event.pid != last[event.instance]:
            yield Violation(f"{event.instance} ended by itself, process {event.pid}")
    answering = {sample.pid for sample in _last_samples(history)}
    for instance, pid in last.items() if answering else ():
        if pid not in answering | ended:
            yield Violation(f"{instance} does not answer at the end, process {pid}")


def _excused(event: Event, outages: Sequence[Fault], history: History) -> bool:
    """Whether a server was away, or just back, at any time between a retry's due time and its delivery.

    Away for one instance only, it excuses what that instance had in hand: it delivered it, or another one did
    that was not the first to claim it.
    """
    due = event.at - (event.late_ms or 0) / 1000
    key = attempt_of(event.retry_id or "")
    row = history.rows_by_key.get(key) if key else None
    passed_on = row is not None and row.claims > 1
    return any(
        (passed_on or fault.hits(history.instance_of.get(event.pid)))
        and fault.began <= event.at
        and due <= fault.healed + HEALS_WITHIN_S + DETECTION_S
        for fault in outages
    )


def _last_samples(history: History) -> list[Sample]:
    return [sample for sample in history.samples if sample.when == "end"]


def _falling(history: History) -> Iterator[Violation]:
    seen: dict[tuple[int, str], float] = {}
    for sample in history.samples:
        for name, value in sample.metrics.items():
            if value < seen.get((sample.pid, name), 0):
                yield Violation(f"{sample.instance}: {name} fell to {value}")
            seen[sample.pid, name] = value
