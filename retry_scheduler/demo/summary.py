"""Counts what became of every message, and judges whether the servers and the consumer agree.

Pure. Counts come from the evidence alone; what the story meant to happen is compared with them last.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from retry_scheduler.demo.evidence import Evidence
from retry_scheduler.demo.invoices import ALWAYS

# (message_id, retry_count): for a row the attempt that failed, for a delivery the retry that came.
Attempt = tuple[str, int]
Things = AbstractSet[str | Attempt]


@dataclass(frozen=True, slots=True)
class Summary:
    """The counts. recovered: messages by the number of retries they took. lateness_ms: ascending.

    lost, duplicates, changed: must be 0. problems: one sentence for each count that is wrong.
    """

    sent: int
    at_once: int
    recovered: Mapping[int, int]
    in_review: int
    quarantined: int
    lost: int
    duplicates: int
    changed: int
    lateness_ms: Sequence[float]
    problems: Sequence[str]


def summarise(evidence: Evidence) -> Summary:
    """Return the counts and what is wrong with them."""
    ends = _ends(evidence)
    kinds = Counter(kinds[0] for kinds in ends.values() if kinds)
    lateness_ms = sorted(_lateness_ms(evidence))
    changed = sum(
        delivery.message_id in evidence.sent and delivery.body != evidence.sent[delivery.message_id].body
        for delivery in evidence.deliveries
    )
    return Summary(
        sent=len(evidence.sent),
        at_once=kinds["succeeded after 0"],
        recovered={
            retries: kinds[f"succeeded after {retries}"]
            for retries in sorted(
                {delivery.retry_count for delivery in evidence.deliveries if delivery.succeeded} - {0}
            )
        },
        in_review=kinds["manual review"],
        quarantined=kinds["quarantined"],
        lost=sum(not kinds for kinds in ends.values()),
        duplicates=_repeats(evidence) + sum(len(kinds) > 1 for kinds in ends.values()),
        changed=changed,
        lateness_ms=lateness_ms,
        problems=[
            *_wrong_ends(evidence, ends),
            *_disagreements(evidence),
            *_wrong_bodies(changed),
            *_early(lateness_ms),
        ],
    )


def percentile(ascending: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of the values do not exceed. ascending: at least one."""
    return ascending[max(0, math.ceil(len(ascending) * share) - 1)]


def _ends(evidence: Evidence) -> dict[str, list[str]]:
    """Every end that was found for each message sent. There must be exactly one."""
    found: dict[str, set[str]] = defaultdict(set)
    for delivery in evidence.deliveries:
        if delivery.succeeded:
            found[delivery.message_id].add(f"succeeded after {delivery.retry_count}")
    for row in evidence.rows:
        if row.status == "failed":
            found[row.message_id].add("manual review")
        elif row.status == "discarded":
            found[row.message_id].add("discarded")
    for kept in evidence.quarantined:
        found[kept.message_id or ""].add("quarantined")
    return {message_id: sorted(found[message_id]) for message_id in evidence.sent}


def _wrong_ends(evidence: Evidence, ends: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if not ends:
        yield "sent: no message was sent"
    for message_id, invoice in evidence.sent.items():
        expected = f"succeeded after {invoice.fails}"
        if invoice.malformed or invoice.fails == ALWAYS:
            expected = "quarantined" if invoice.malformed else "manual review"
        found = " and ".join(ends[message_id])
        if not found:
            yield f"lost: {invoice.number} has come to no end"
        elif found != expected:
            yield f"wrong end: {invoice.number} should have {expected}, and has {found}"


def _repeats(evidence: Evidence) -> int:
    delivered = [(delivery.message_id, delivery.retry_count) for delivery in evidence.deliveries]
    copied = [copy.message_id for copy in evidence.copies]
    return len(delivered) - len(set(delivered)) + len(copied) - len(set(copied))


def _disagreements(evidence: Evidence) -> Iterator[str]:
    """Compare each thing with its counterpart elsewhere, message by message."""
    repeats = _repeats(evidence)
    if repeats:
        yield f"duplicates: {repeats} deliveries or copies came more than once"
    by_status: dict[str, set[Attempt]] = defaultdict(set)
    for row in evidence.rows:
        by_status[row.status].add((row.message_id, row.retry_count))
    failures = {(one.message_id, one.retry_count) for one in evidence.deliveries if not one.succeeded}
    retries = {(one.message_id, one.retry_count - 1) for one in evidence.deliveries if one.retry_count}
    stored = set().union(*by_status.values())
    kept = {kept.message_id or "" for kept in evidence.quarantined}
    malformed = {copy.message_id or "" for copy in evidence.copies if copy.reason == "malformed"}
    reviewed = {copy.message_id or "" for copy in evidence.copies if copy.reason != "malformed"}
    yield from _difference(evidence, "rows still pending", by_status["pending"], set())
    yield from _difference(evidence, "rows `retried`, and retries that came", by_status["retried"], retries)
    yield from _difference(
        evidence, "rows `failed`, and copies in manual review", _ids(by_status["failed"]), reviewed
    )
    yield from _difference(evidence, "quarantined requests, and copies in manual review", kept, malformed)
    yield from _difference(
        evidence,
        "failures of the consumer, and rows",
        failures,
        stored | {one for one in failures if one[0] in kept},
    )
    yield from _difference(
        evidence,
        "messages that came, and messages sent",
        {one.message_id for one in evidence.deliveries},
        set(evidence.sent),
    )
    for queue, depth in evidence.depths.items():
        expected = len(evidence.copies) if queue.startswith("manual-review") else 0
        if depth != expected:
            yield f"queue {queue}: holds {depth} messages, should hold {expected}"


def _difference(evidence: Evidence, what: str, left: Things, right: Things) -> Iterator[str]:
    odd = left ^ right
    if odd:
        first = min(odd, key=str)
        name = evidence.name_of(first if isinstance(first, str) else first[0])
        yield f"{what}: {len(left)} and {len(right)}, at odds over {name}"


def _ids(attempts: Collection[Attempt]) -> set[str]:
    return {message_id for message_id, _ in attempts}


def _wrong_bodies(changed: int) -> Iterator[str]:
    if changed:
        yield f"bodies: {changed} deliveries were not what had been sent"


def _lateness_ms(evidence: Evidence) -> Iterator[float]:
    due = {(row.message_id, row.retry_count + 1): row.next_retry_at for row in evidence.rows}
    for delivery in evidence.deliveries:
        due_at = due.get((delivery.message_id, delivery.retry_count))
        if due_at is not None:
            yield (delivery.arrived_at - due_at).total_seconds() * 1000


def _early(lateness_ms: Sequence[float]) -> Iterator[str]:
    if not lateness_ms:
        yield "lateness: no retry came at all"
    elif lateness_ms[0] < 0:
        yield f"early: a retry came {-lateness_ms[0]:.1f} ms before it was due"
