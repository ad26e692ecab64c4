"""Fifteen ways to break the service, each a mistake that somebody has made before; see `teeth`.

Each is made by replacing a function or a part of a statement inside the service's own process. What they
replace is asserted to be there: a break that breaks nothing must not pass for one that was caught.
"""

import base64
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any

import retry_scheduler.broker.frames as frames_module
import retry_scheduler.consumer as consumer_module
import retry_scheduler.sql as sql_module
from retry_scheduler import database, messages
from retry_scheduler.broker.confirms import ConfirmBatch, ConfirmLedger, Outcome
from retry_scheduler.broker.connection import Connection
from retry_scheduler.broker.intake_link import Delivery, IntakeLink
from retry_scheduler.consumer import Consumer
from retry_scheduler.errors import MalformedRequest, Unavailable
from retry_scheduler.messages import RetryRequest
from retry_scheduler.presence import Presence
from retry_scheduler.repository import Attempt, Repository, Stored
from retry_scheduler.settlement import Settler


def _change_statement(name: str, *changes: tuple[str, str]) -> None:
    statements = sql_module._queries()
    for old, new in changes:
        if old not in statements[name]:
            raise AssertionError(f"{name} no longer says {old!r}")
        statements[name] = statements[name].replace(old, new)


def acknowledge_before_commit() -> None:
    acknowledge, run_once = IntakeLink.acknowledge, Consumer.run_once

    async def first_acknowledge(self: Consumer, batch: Sequence[Delivery], *, again: bool = False) -> None:
        if not again:
            acknowledge(self._intake, batch)
        await run_once(self, batch, again=again)

    IntakeLink.acknowledge = lambda self, batch: None  # type: ignore[method-assign]
    Consumer.run_once = first_acknowledge  # type: ignore[method-assign]


def publish_without_mandatory() -> None:
    def sample() -> list[bytes]:
        frames_module._publish_frame.cache_clear()
        return frames_module.message_frames(1, "queue", b"", b"", 1)

    mandatory = sample()
    frames_module._MANDATORY = 0
    if sample() == mandatory:
        raise AssertionError("messages are marked as mandatory somewhere else")


def take_returned_for_delivered() -> None:
    ConfirmLedger.returned = lambda self, key: None  # type: ignore[method-assign]


def settle_without_a_fence() -> None:
    _change_statement(
        "complete",
        ("AND task.claims = done.claims\n", "\n"),
        ("task.claims = done.claims AND task.status", "task.status"),
    )
    _change_statement("release", ("AND task.claims = given.claims ", ""))


def overwrite_stored_attempts() -> None:
    _change_statement(
        "store_requests",
        (
            "ON CONFLICT (message_id, retry_count) DO NOTHING",
            "ON CONFLICT (message_id, retry_count) DO UPDATE SET status = 'pending', "
            "next_retry_at = EXCLUDED.next_retry_at, finished_at = NULL, claimed_until = NULL",
        ),
    )


def claim_without_a_lease() -> None:
    _change_statement(
        "claim_due",
        ("claimed_until IS NULL\n", "true\n"),
        ("FOR UPDATE SKIP LOCKED", ""),
    )


def take_silence_for_a_confirm() -> None:
    settle_rest = ConfirmBatch.settle_rest

    def confirm_rest(self: ConfirmBatch, outcome: Outcome) -> None:
        settle_rest(self, Outcome.CONFIRMED)

    ConfirmBatch.settle_rest = confirm_rest  # type: ignore[method-assign]


def reuse_channel_after_timeout() -> None:
    """The channel is kept and the numbers of what was given up are used again, for other messages."""
    ledgers: list[ConfirmLedger] = []
    make, cut, settle_rest = ConfirmLedger.__init__, Connection.cut, ConfirmBatch.settle_rest

    def remember(self: ConfirmLedger) -> None:
        make(self)
        ledgers.append(self)

    def wind_back(self: ConfirmBatch, outcome: Outcome) -> None:
        for ledger in ledgers:
            for tag in [tag for tag, entry in ledger._outstanding.items() if entry[0] is self]:
                del ledger._outstanding[tag]
                ledger._next_tag -= 1
        settle_rest(self, outcome)

    def keep(self: Connection, reason: str) -> None:
        if reason != "confirms did not come in time":
            cut(self, reason)

    ConfirmLedger.__init__ = remember  # type: ignore[method-assign]
    ConfirmBatch.settle_rest = wind_back  # type: ignore[method-assign]
    Connection.cut = keep  # type: ignore[method-assign]


def trust_leases_after_a_freeze() -> None:
    Presence.fenced = lambda self, now_s: self._last_beat_s is None  # type: ignore[method-assign]


def requeue_malformed() -> None:
    run_once = Consumer.run_once

    async def requeue(self: Consumer, batch: Sequence[Delivery], *, again: bool = False) -> None:
        good = []
        for delivery in batch:
            try:
                self._read(delivery)
                good.append(delivery)
            except MalformedRequest:
                delivery.connection.channel.basic_nack(delivery.tag, requeue=True)
        if good:
            await run_once(self, good, again=again)

    Consumer.run_once = requeue  # type: ignore[method-assign]


CLOCK_IS_SLOW_BY_S = 5.0


def compute_due_times_by_own_clock() -> None:
    """And this machine's clock is slow, as clocks are that nobody watches."""
    store = Repository.store
    _change_statement("store_requests", ("clock_timestamp() + delay", "'epoch'::timestamptz + delay"))

    async def by_own_clock(
        self: Repository, requests: Sequence[RetryRequest], delays: Sequence[timedelta]
    ) -> dict[Attempt, Stored]:
        now = timedelta(seconds=time.time() - CLOCK_IS_SLOW_BY_S)
        return await store(self, requests, [now + delay for delay in delays])

    Repository.store = by_own_clock  # type: ignore[method-assign]


def swallow_errors_when_settling() -> None:
    async def once(self: Settler, call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await call()
        except Unavailable:
            return set()

    Settler._until_possible = once  # type: ignore[method-assign]


def commit_asynchronously() -> None:
    database.SESSION["synchronous_commit"] = "off"


def decode_base64_leniently() -> None:
    parse = messages.parse_request

    def lenient(body: bytes, **options: Any) -> RetryRequest:
        try:
            fields = json.loads(body)
            payload = base64.b64decode(fields["original_payload"], validate=False)
            repaired = fields | {"original_payload": base64.b64encode(payload).decode()}
        except (ValueError, TypeError, KeyError):
            return parse(body, **options)
        return parse(json.dumps(repaired).encode(), **options)

    vars(consumer_module)["parse_request"] = lenient


def match_returns_by_message_id() -> None:
    sent, returned = ConfirmLedger.sent, ConfirmLedger.returned

    def by_message(self: ConfirmLedger, batch: ConfirmBatch, place: int, key: str, body_bytes: int) -> None:
        sent(self, batch, place, key.partition(":")[0], body_bytes)

    def returned_message(self: ConfirmLedger, key: str | None) -> None:
        returned(self, key and key.partition(":")[0])

    ConfirmLedger.sent = by_message  # type: ignore[method-assign]
    ConfirmLedger.returned = returned_message  # type: ignore[method-assign]
