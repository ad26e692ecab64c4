"""The verdict on a history: every invariant, and what happened to those that violate one. Pure."""

from collections.abc import Iterator, Sequence

from chaos import conduct, safety
from chaos.finding import Finding
from chaos.history import History

INVARIANTS = (
    safety.nothing_lost,
    safety.nothing_unexpected,
    safety.one_end,
    safety.duplicates_explained,
    safety.recovered_obey,
    safety.never_early,
    safety.right_way,
    conduct.counters_tell_the_truth,
    conduct.heals,
    conduct.bounded,
    conduct.secrets_kept,
)

# So many violations of one invariant are shown with all that is known about them.
SHOWN = 5


def check(history: History) -> list[Finding]:
    """Return the verdict on each invariant, in their order."""
    return [invariant(history) for invariant in INVARIANTS]


def holds(findings: Sequence[Finding]) -> bool:
    """Whether no invariant is violated."""
    return not any(finding.violations for finding in findings)


def explain(finding: Finding, history: History) -> Iterator[str]:
    """Yield the first violations of an invariant, each with the history of what it is about."""
    for violation in finding.violations[:SHOWN]:
        yield f"{finding.invariant}: {violation.what}: {violation.subject or ''}"
        if violation.subject:
            yield from (f"      {line}" for line in biography(violation.subject, history))


def biography(subject: str, history: History) -> list[str]:
    """Return all that is known about an x-retry-id or a body's digest, in the order of time."""
    known: list[tuple[float, str]] = []
    for enqueue in history.enqueues:
        key = enqueue.key
        if subject in (enqueue.body_sha256, f"{key[0]}:{key[1]}" if key else None):
            known.append((enqueue.invoked_at, f"requested ({enqueue.kind}): {enqueue.outcome}"))
    for arrival in (*history.deliveries, *history.reviews):
        if arrival.retry_id == subject:
            marked = ", redelivered" if arrival.redelivered else ""
            known.append((arrival.at, f"arrived in {arrival.queue}{marked}"))
    known += [
        (event.at, f"process {event.pid}: {event.message}") for event in history.events_by_id.get(subject, ())
    ]
    for row in history.rows:
        if row.retry_id == subject:
            known.append((row.created_at, "stored"))
            known.append((row.finished_at or float("inf"), f"in the table: {row.status}, {row.note}"))
    if known:
        first, last = min(at for at, _ in known) - 5, max(at for at, _ in known if at < float("inf")) + 5
        for fault in history.faults:
            if fault.began <= last and fault.healed >= first:
                known.append((fault.began, f"fault: {fault.name} {fault.instance or ''}"))
                known.append((fault.healed, f"healed: {fault.name} {fault.instance or ''}"))
    return [f"{at:12.3f} {what}" for at, what in sorted(known)]
