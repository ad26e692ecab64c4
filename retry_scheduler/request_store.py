"""Gets requests into the table: new ones as they are, repeated ones by the rules, and sets bad ones apart.

    waiting -> stored, due after the delay that is worked out here
            -> refused by PostgreSQL, and found among the others by storing ever smaller parts
            -> conflict: the attempt is stored already; `repeated_attempts` decides what that means

Nothing here is acknowledged. A statement whose answer is lost may have been carried out: the next try asks
for what it has stored.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

from retry_scheduler.agenda import Agenda
from retry_scheduler.backoff import BackoffPolicy, delay_asked_for, delay_before_retry
from retry_scheduler.errors import DataRefused, MalformedRequest
from retry_scheduler.messages import RetryRequest, log_fields
from retry_scheduler.observability import events, logs
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.repeated_attempts import Candidate, Refusals, RepeatedAttempts
from retry_scheduler.repository import Attempt, Repository, Stored
from retry_scheduler.transfer import transfer_s

# So many suspected rows are tried one by one: if most of them are bad, parting them further takes longer.
FEW = 16


class RequestStore:
    """Stores candidates, and tells the agenda, the log and the metrics of each."""

    def __init__(
        self,
        repository: Repository,
        agenda: Agenda,
        metrics: Metrics,
        *,
        policy: BackoffPolicy,
        on_step: Callable[[float], None],
    ) -> None:
        """on_step: called before each statement, with the seconds that it may take more for its bytes."""
        self._repository = repository
        self._agenda = agenda
        self._metrics = metrics
        self._policy = policy
        self._on_step = on_step
        self._repeated_attempts = RepeatedAttempts(repository, metrics)
        self._refused_queues: set[str] = set()  # of the last batch, if nothing else went there

    async def store(self, candidates: Sequence[Candidate], *, again: bool = False) -> Refusals:
        """Store all, repeated attempts by the rules. Return those that cannot be stored.

        again: an earlier try may have stored some, and may still be under way on a slow link and come
        through before this one.
        Raises Unavailable; then some are stored, and their deliveries done.
        """
        refused: Refusals = {}
        waiting = await self._not_stored_yet(candidates) if again else list(candidates)
        while waiting:
            # Each attempt once in a statement; what became of it decides about its repetitions.
            first: dict[Attempt, Candidate] = {}
            for candidate in waiting:
                first.setdefault(candidate.request.attempt, candidate)
            stored, unstorable = await self._insert_all(list(first.values()))
            self._report(first, stored)
            refused |= unstorable
            rest = [c for c in waiting if not c.delivery.done and c not in unstorable]
            # Of an attempt whose first request cannot be stored, the next one is tried.
            untried = [c for c in rest if first[c.request.attempt] in unstorable]
            repeated = [c for c in rest if first[c.request.attempt] not in unstorable]
            if again and repeated:
                repeated = await self._not_stored_yet(repeated)
            onward, at_the_end = await self._repeated_attempts.onward(repeated)
            refused |= at_the_end
            waiting = untried + onward
        return refused

    async def _not_stored_yet(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Report what an earlier try has stored although its answer was lost, and return the rest."""
        stored = await self._repository.stored_intakes([candidate.request for candidate in candidates])
        rest: list[Candidate] = []
        for candidate in candidates:
            if candidate.delivery.intake_id in stored:
                attempt, entry = stored[candidate.delivery.intake_id]
                candidate.request.retry_count = attempt[1]
                self._report({attempt: candidate}, {attempt: entry})
            else:
                rest.append(candidate)
        return rest

    async def _insert_all(self, candidates: Sequence[Candidate]) -> tuple[dict[Attempt, Stored], Refusals]:
        """Store attempts, and find those that PostgreSQL refuses: each of them was refused alone."""
        stored: dict[Attempt, Stored] = {}
        refused: Refusals = {}
        parts = _apart(
            candidates, {c for c in candidates if c.request.original_queue in self._refused_queues}
        )
        while parts:
            part = parts.pop()
            if not part:
                continue
            try:
                stored |= await self._insert(part)
            except DataRefused as problem:
                if len(part) > 1:
                    parts += _parted(part, problem.detail)
                else:
                    refused[part[0]] = MalformedRequest("body", str(problem))
        self._refused_queues = _queues(refused)
        if refused:
            self._refused_queues -= _queues(each for each in candidates if each not in refused)
        return stored, refused

    async def _insert(self, candidates: Sequence[Candidate]) -> dict[Attempt, Stored]:
        requests = [candidate.request for candidate in candidates]
        self._on_step(transfer_s(sum(len(request.payload) for request in requests)))
        return await self._repository.store(requests, [self._delay(request) for request in requests])

    def _delay(self, request: RetryRequest) -> timedelta:
        if request.retry_count >= request.max_retries:
            return timedelta(0)  # exhausted: waiting helps nobody
        if request.retry_after_ms is not None:
            return delay_asked_for(request.retry_after_ms)
        return delay_before_retry(request.retry_count, self._policy, random.random())

    def _report(self, first: dict[Attempt, Candidate], stored: dict[Attempt, Stored]) -> None:
        for attempt in stored:
            first[attempt].delivery.done = True
            if first[attempt].told != attempt:
                self._metrics.duplicate("stored_as_next")
        queues = Counter(first[attempt].request.original_queue for attempt in stored)
        for queue, count in queues.items():
            self._metrics.scheduled(queue, count)
        logs.info_lines(
            events.RETRY_SCHEDULED,
            (
                log_fields(first[attempt].request) | {"next_retry_at": entry.next_retry_at.isoformat()}
                for attempt, entry in stored.items()
            ),
        )
        self._agenda.expect(entry.due_in_s for entry in stored.values())


def _parted(candidates: Sequence[Candidate], detail: str) -> list[list[Candidate]]:
    """Part what PostgreSQL has refused as a whole, so that all that is bad is likely to be in few parts.

    detail: of the refusal. That of a constraint shows the row, and so the message; what else goes to its
    queue is suspected with it. Only likely: an error text in the row may name other messages.
    """
    named = {each for each in candidates if each.request.message_id in detail}
    queues = _queues(named)
    for suspected in ({each for each in candidates if each.request.original_queue in queues}, named):
        if 0 < len(suspected) < len(candidates):
            return _apart(candidates, suspected)
    middle = len(candidates) // 2
    return [list(candidates[:middle]), list(candidates[middle:])]


def _queues(candidates: Iterable[Candidate]) -> set[str]:
    return {candidate.request.original_queue for candidate in candidates}


def _apart(candidates: Sequence[Candidate], suspected: set[Candidate]) -> list[list[Candidate]]:
    """Return the suspected ones, each alone if they are few, and the others; either may be empty."""
    others = [each for each in candidates if each not in suspected]
    rest = [each for each in candidates if each in suspected]
    return [*([each] for each in rest), others] if len(rest) <= FEW else [rest, others]
