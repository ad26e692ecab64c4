"""I1 to I7: what becomes of messages. Pure functions over a history.

In the words of Jepsen's total queue: *lost* was accepted and has no end, *unexpected* was never sent or has
been changed, *duplicated* came more than once, *recovered* came although nobody knew whether it was accepted.
"""

from collections import Counter
from collections.abc import Iterator

from chaos.duplicates import Explanations, most_duplicates, publications
from chaos.finding import Finding, Violation
from chaos.history import Arrival, Enqueue, History, Key, Row
from chaos.requests import FULL_QUEUE, MISSING_QUEUE

# The contract's bound on what one instance has outstanding (docs/contract.md).
MOST_OUTSTANDING = 512

# Consumer and database share one clock here; this is for its readings, taken by two programs.
EARLY_TOLERANCE_S = 0.05

# A queue learns a little later that its policy has changed.
FULL_UNTIL_S = 1.0

# Nothing that is sent here is unpublishable.
REASONS = {"exhausted", "unroutable", "malformed"}


def nothing_lost(history: History) -> Finding:
    """I1: what was accepted has come to its end, and nothing is left over."""
    accepted = [enqueue for enqueue in history.enqueues if enqueue.outcome == "ok"]
    lost = [enqueue for enqueue in accepted if not _has_ended(enqueue, history)]
    pending = [row for row in history.rows if row.status == "pending"]
    waiting = [kept for kept in history.quarantined if not kept.delivered]
    return Finding(
        "I1",
        "nothing is lost",
        {
            "accepted": len(accepted),
            "lost": len(lost),
            "pending": len(pending),
            "in quarantine": len(waiting),
        },
        [
            *(Violation(f"lost: {each.kind}", _subject(each)) for each in lost),
            *(Violation("still pending", row.retry_id) for row in pending),
            *(Violation("not delivered to manual review", kept.retry_id) for kept in waiting),
        ],
    )


def nothing_unexpected(history: History) -> Finding:
    """I2: everything that comes was sent, unchanged, and says which retry it is."""
    violations: list[Violation] = []
    malformed = {each.body_sha256 for each in history.enqueues if each.message_id is None}
    for arrival in (*history.deliveries, *history.reviews):
        problem = _unexpected(arrival, history, malformed)
        if problem:
            violations.append(Violation(f"unexpected in {arrival.queue}: {problem}", arrival.retry_id))
    violations += _more_attempts_than_requests(history)
    return Finding(
        "I2",
        "nothing is unexpected or changed",
        {
            "delivered": len(history.deliveries),
            "reviewed": len(history.reviews),
            "unexpected": len(violations),
        },
        violations,
    )


def one_end(history: History) -> Finding:
    """I3: each attempt has one row and one end, and the table says of it what consumers have seen.

    One that was delivered, and whose process died before it could say so, may be refused by its queue when it
    is sent again, and go to people in the end: then it has come twice, for a reason.
    """
    explanations = Explanations(history)
    violations = []
    for row in history.rows:
        delivered = history.deliveries_by_id.get(row.retry_id, ())
        reviewed = history.reviews_by_id.get(row.retry_id, ())
        if row.status == "retried" and not delivered:
            violations.append(Violation("retried, and no consumer has got it", row.retry_id))
        if row.status == "failed" and not reviewed:
            violations.append(Violation("failed, and manual review has not got it", row.retry_id))
        if row.status == "failed" and delivered:
            together = sorted([*delivered, *reviewed], key=lambda arrival: arrival.at)
            ended_at = min((arrival.at for arrival in reviewed), default=0.0)
            if delivered[-1].at > ended_at or explanations.unexplained(together):
                violations.append(Violation("failed, and a consumer has got it", row.retry_id))
        if row.status == "retried" and reviewed:
            violations.append(Violation("retried, and manual review has got it", row.retry_id))
    keys = Counter(row.key for row in history.rows)
    violations += [
        Violation("more than one row", f"{key[0]}:{key[1]}") for key, count in keys.items() if count > 1
    ]
    for kept in history.quarantined:
        if kept.delivered and kept.retry_id not in history.reviews_by_id:
            violations.append(
                Violation("noted as delivered, and manual review has not got it", kept.retry_id)
            )
    statuses = Counter(row.status for row in history.rows)
    return Finding("I3", "one end each", dict(sorted(statuses.items())), violations)


def duplicates_explained(history: History) -> Finding:
    """I4: every duplicate is explained by a fault, and they are within the contract's bound."""
    explanations = Explanations(history)
    duplicated = 0
    violations = []
    for retry_id, arrivals in [*history.deliveries_by_id.items(), *history.reviews_by_id.items()]:
        duplicated += max(publications(arrivals) - 1, 0)
        count = explanations.unexplained(arrivals)
        if count:
            violations.append(Violation(f"{count} of {publications(arrivals)} without a reason", retry_id))
    instances = len({event.instance for event in history.instance_events}) or 1
    bound = most_duplicates(history, MOST_OUTSTANDING, instances)
    if duplicated > bound:
        violations.append(Violation(f"{duplicated} duplicates are more than {bound}"))
    figures = {"duplicated": duplicated, "unexplained": len(violations), "bound": bound}
    return Finding("I4", "every duplicate has a reason", figures, violations)


def recovered_obey(history: History) -> Finding:
    """I5: a request of unknown fate may be in the queue or not; if it is, it comes to its end as well."""
    unknown = [each for each in history.enqueues if each.outcome == "info"]
    recovered, violations = 0, []
    for each in unknown:
        if each.key is not None and each.key in history.rows_by_key:
            recovered += 1
            if not _has_ended(each, history):
                violations.append(Violation("recovered, and then lost", _subject(each)))
        elif each.key is None and _has_ended(each, history):
            recovered += 1
    return Finding(
        "I5",
        "what was recovered obeys too",
        {"unknown": len(unknown), "recovered": recovered},
        violations,
    )


def never_early(history: History) -> Finding:
    """I6: nothing comes before its delay is over."""
    violations = []
    earliest_ms = float("inf")
    for retry_id, arrivals in history.deliveries_by_id.items():
        key = arrivals[0].key
        row = history.rows_by_key.get(key) if key else None
        if row is None:
            continue
        due = row.created_at + _least_delay_s(row, history)
        after_s = min(arrival.at for arrival in arrivals) - due
        earliest_ms = min(earliest_ms, after_s * 1000)
        if after_s < -EARLY_TOLERANCE_S:
            violations.append(Violation(f"{-after_s:.3f} s early", retry_id))
    figures = {"early": len(violations), "soonest after its least delay, ms": earliest_ms}
    return Finding("I6", "nothing is early", figures, violations)


def right_way(history: History) -> Finding:
    """I7: exhausted attempts go to people, the others to their queues, and every exception has its reason."""
    violations = []
    for arrival in history.deliveries:
        row = history.rows_by_key.get(arrival.key) if arrival.key else None
        if row is not None and row.retry_count >= row.max_retries:
            violations.append(Violation("exhausted, and back in its queue", arrival.retry_id))
    for arrival in history.reviews:
        row = history.rows_by_key.get(arrival.key) if arrival.key else None
        exhausted = row is not None and row.retry_count >= row.max_retries
        if arrival.reason not in REASONS or (arrival.reason == "malformed") != (arrival.key is None):
            violations.append(Violation(f"in review for {arrival.reason}", arrival.retry_id))
        elif row is not None and exhausted != (arrival.reason == "exhausted"):
            violations.append(Violation(f"in review as {arrival.reason}", arrival.retry_id))
        elif arrival.reason == "unroutable" and not (row and _undeliverable(row, history)):
            violations.append(Violation("in review as unroutable, and its queue takes it", arrival.retry_id))
    reasons = Counter(str(arrival.reason) for arrival in history.reviews)
    return Finding("I7", "everything goes the right way", dict(sorted(reasons.items())), violations)


def _has_ended(enqueue: Enqueue, history: History) -> bool:
    """Whether a consumer or manual review has got what the request asks for."""
    if enqueue.key is None:
        return enqueue.body_sha256 in history.malformed_and_reviewed
    retry_id = f"{enqueue.key[0]}:{enqueue.key[1]}"
    return retry_id in history.deliveries_by_id or retry_id in history.reviews_by_id


def _unexpected(arrival: Arrival, history: History, malformed: set[str]) -> str | None:
    if arrival.key is None:
        if arrival.queue != "review":
            return "its x-retry-id names no attempt"
        return None if arrival.sha256 in malformed else "it was never sent like that"
    requests = history.requests_by_id.get(arrival.key[0])
    if requests is None:
        return "it was never sent"
    left_out = arrival.reason == "unpublishable" and arrival.sha256 is None  # it stays in the table
    if not left_out and arrival.sha256 not in {each.payload_sha256 for each in requests}:
        return "its payload has changed"
    if arrival.message_id != arrival.key[0]:
        return f"its message_id is {arrival.message_id}"
    if arrival.queue == "review":
        return None if arrival.retry_count == arrival.key[1] else f"retry_count is {arrival.retry_count}"
    if arrival.queue not in {each.queue for each in requests}:
        return "it was sent for another queue"
    if arrival.retry_count != arrival.key[1] + 1:
        return f"x-retry-count is {arrival.retry_count}"
    return None


def _undeliverable(row: Row, history: History) -> bool:
    """Whether its queue does not exist, or was full while it was pending."""
    queues = {each.queue for each in history.requests_by_id.get(row.message_id, ())}
    was_full = any(
        fault.name == "full queue"
        and row.created_at <= fault.healed + FULL_UNTIL_S
        and fault.began <= (row.finished_at or float("inf"))
        for fault in history.faults
    )
    return MISSING_QUEUE in queues or (FULL_QUEUE in queues and was_full)


def _more_attempts_than_requests(history: History) -> Iterator[Violation]:
    """A repeated request may become the next attempt; but never do more attempts exist than requests."""
    attempts = Counter(row.message_id for row in history.rows)
    for message_id, count in attempts.items():
        requests = len(history.requests_by_id.get(message_id, ()))
        if count > requests:
            yield Violation(f"{count} attempts of {requests} requests", message_id)


def _least_delay_s(row: Row, history: History) -> float:
    base_ms, cap_ms = history.backoff_ms
    backoff_ms = min(base_ms * 2 ** min(row.retry_count, 40), cap_ms)
    asked_for = [
        backoff_ms if each.least_delay_ms is None else each.least_delay_ms
        for each in history.requests_by_id.get(row.message_id, ())
    ]
    return min(asked_for, default=0) / 1000


def _subject(enqueue: Enqueue) -> str:
    key: Key | None = enqueue.key
    return f"{key[0]}:{key[1]}" if key else enqueue.body_sha256
