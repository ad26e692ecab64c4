"""poison: what the other traffic loses while messages that cannot arrive, or do harm, are among it.

Good requests of 1 KiB, due at once, as fast as the service takes them, and in turns the same with one
kind of poison spread among them. Every share is of two runs in the same process, seconds apart. What is
left of a poison afterwards is removed, so that it does not count against the next one.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import islice

import asyncpg

from benchmarks.bed import Bed, Place, Program
from benchmarks.contestants import ERROR, TUNED, Service
from benchmarks.figures import median
from benchmarks.load import ORDERS, PAYLOAD_BASE64, REQUESTS, Load, Message, load, messages
from benchmarks.scenario import Figures, Options, Row, Scenario, say
from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.broker.publication import RETRY_ID, Publication
from retry_scheduler.suspicion import ALONE_AFTER

# The promise: with any of them in the queue, the others keep this share of their rate.
BOUND = 0.9
REQUEST_COUNT = (60_000, 300)
LIMIT_S = 180

# Due at once by the request, not by the settings: what cannot be delivered has the default backoff.
SETTINGS = TUNED
DUE_AT_ONCE_MS = 1

REVIEW = "manual-review.pending"
OTHERS, NOWHERE, HANGING = "bench.others", "bench.nowhere", "bench.hanging"
SUSPECTED, REFUSED = "bench.suspected", "bench.refused"

MESSAGE_LIMIT_BYTES = 50_000
ABOVE_LIMIT = base64.b64encode(bytes(64 * 1024)).decode()
TEN_MIB = base64.b64encode(bytes(10 * 1024 * 1024 * 3 // 4)).decode()

# Just below the largest frame, and what is looked for stands at the end.
GIANT_HEADERS = {f"x-{n}": "h" * 100 for n in range(1100)} | {"traceparent": "00-" + "0" * 52}
GIANT_REASON = "e" * 200_000

SUSPECT = f"""
CREATE FUNCTION bench_suspect() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.claims_unsettled := {ALONE_AFTER};
    RETURN NEW;
END $$;
CREATE TRIGGER bench_suspect BEFORE INSERT ON retry_queue
    FOR EACH ROW WHEN (NEW.original_queue = '{SUSPECTED}') EXECUTE FUNCTION bench_suspect();
"""
REFUSE = f"ALTER TABLE retry_queue ADD CONSTRAINT bench_refuse CHECK (original_queue <> '{REFUSED}')"
FORGET = (
    "UPDATE retry_queue SET status = 'discarded', finished_at = now() WHERE status = 'pending'",
    "UPDATE retry_quarantine SET delivered_at = now() WHERE delivered_at IS NULL",
)

Made = tuple[Message, Publication]


@asynccontextmanager
async def as_it_is(place: Place) -> AsyncIterator[None]:
    """Leave the servers alone: the message is bad enough."""
    yield


@asynccontextmanager
async def hanging(place: Place) -> AsyncIterator[None]:
    """A queue that takes messages and confirms none, as one without a majority."""
    process = (
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{place.name}">>, queue, <<"{HANGING}">>)), '
        "Pid = amqqueue:get_pid(Q), "
    )
    await asyncio.to_thread(place.rabbitmq.eval, process + "sys:suspend(Pid).")
    try:
        yield
    finally:
        await asyncio.to_thread(place.rabbitmq.eval, process + "sys:resume(Pid).")


@asynccontextmanager
async def suspecting(place: Place) -> AsyncIterator[None]:
    """Rows for one queue are suspected, as if they had been in hand at as many crashes as that takes."""
    await _execute(place, SUSPECT)
    try:
        yield
    finally:
        await _execute(place, "DROP FUNCTION bench_suspect CASCADE")


@asynccontextmanager
async def refusing(place: Place) -> AsyncIterator[None]:
    """The table refuses rows for one queue. Nothing in a message can bring that about; an operator can."""
    await _execute(place, REFUSE)
    try:
        yield
    finally:
        await _execute(place, "ALTER TABLE retry_queue DROP CONSTRAINT bench_refuse")


@contextmanager
def small_messages_only(place: Place) -> Iterator[None]:
    """What an operator does who protects a broker; it holds for channels opened from now on."""
    before = place.rabbitmq.eval("{ok, Size} = application:get_env(rabbit, max_message_size), Size.")
    limit = "application:set_env(rabbit, max_message_size, {})."
    place.rabbitmq.eval(limit.format(MESSAGE_LIMIT_BYTES))
    try:
        yield
    finally:
        place.rabbitmq.eval(limit.format(before))


def _request(message: Message, queue: str = OTHERS, **fields: object) -> bytes:
    body = {
        "message_id": message.message_id,
        "original_payload": PAYLOAD_BASE64,
        "original_queue": queue,
        "error_reason": ERROR,
        "retry_count": message.retry_count,
        "max_retries": 10,
        "retry_after_ms": message.delay_ms,
        **fields,
    }
    return json.dumps(body).encode()


@dataclass(frozen=True)
class Poison:
    """One kind. one_in: so many good ones for each. trap: what the servers have to do with it."""

    name: str
    body: Callable[[Message], bytes]
    one_in: int = 100
    headers: Mapping[str, str] | None = None
    trap: Callable[[Place], AbstractAsyncContextManager[None]] = as_it_is


POISONS = (
    Poison("no JSON", lambda message: _request(message)[:-5]),
    Poison("wrong base64", lambda message: _request(message, original_payload="aGVs!!bG8=")),
    # Where it is the bytes that cost, so few that they are not most of all bytes.
    Poison("10 MiB that are no base64", lambda m: _request(m, original_payload=TEN_MIB[:-1]), one_in=10_000),
    Poison(
        "headers of 120 KB, error text of 200 KB",
        lambda message: _request(message, error_reason=GIANT_REASON),
        headers=GIANT_HEADERS,
        one_in=1000,
    ),
    Poison("to a queue that does not exist", lambda message: _request(message, NOWHERE)),
    Poison("to a queue that never confirms", lambda message: _request(message, HANGING), trap=hanging),
    Poison("refused by PostgreSQL", lambda message: _request(message, REFUSED), trap=refusing),
    Poison("suspected, and innocent", lambda message: _request(message, SUSPECTED), trap=suspecting),
)
# The service's channels have to be opened under the limit, and those of the upstream before.
ABOVE_THE_LIMIT = Poison(
    "above the broker's size limit, closes the channel",
    lambda message: _request(message, original_payload=ABOVE_LIMIT),
    one_in=3000,
)
ALL_KINDS = (*POISONS, ABOVE_THE_LIMIT)


@dataclass(frozen=True)
class Pace:
    """How fast the good ones went. cpu_us: of the service and both servers, for each good one."""

    rate_per_s: float
    cpu_us: float


@dataclass(frozen=True)
class Trial:
    """A service under load, and what its pace is."""

    at: Bed
    place: Place
    both: Load
    programs: Sequence[Program]

    async def pace(self, good: Sequence[Made], poison: Poison | None = None) -> Pace:
        """Return how the good ones went, until the last has arrived. Nothing else stays behind."""
        self.at.settle()
        made = _mixed(good, poison) if poison else good
        wanted = len(self.both.arrivals) + len(good)
        before = self.place.usage(self.programs)
        began = time.monotonic()
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as sides:
            sides.create_task(self.both.send(made))
            sides.create_task(self.both.receive(wanted))
        took_s = time.monotonic() - began
        used_us = self.place.usage(self.programs).per_retry_us(before, len(good))
        await _forget(self.place)
        cpu_us = sum(used_us[who] for who in ("program", "rabbitmq", "postgres"))
        return Pace(len(good) / took_s, cpu_us)


async def _measure(at: Bed, options: Options) -> Figures:
    count = options.scaled(*REQUEST_COUNT)
    runs: dict[str, list[Figures]] = {poison.name: [] for poison in ALL_KINDS}
    duplicates = 0
    for turn in range(options.repetitions):
        with at.place(f"poison_{turn}") as place:
            place.migrate()
            async with load(place.url, REQUESTS, OTHERS, HANGING, SUSPECTED) as both:
                async with Service(SETTINGS).running(place) as programs:
                    await _take_turns(Trial(at, place, both, programs), POISONS, count, runs)
                with small_messages_only(place):
                    async with Service(SETTINGS).running(place) as programs:
                        await _take_turns(Trial(at, place, both, programs), (ABOVE_THE_LIMIT,), count, runs)
                duplicates += both.repeated
    return {
        "requests": count,
        "settings": SETTINGS,
        "bound": BOUND,
        "poisons": [
            {"name": poison.name, "one_in": poison.one_in, **_together(runs[poison.name])}
            for poison in ALL_KINDS
        ],
        "duplicates": duplicates,
    }


def _together(runs: Sequence[Figures]) -> Figures:
    names = ("rate_per_s", "clean_per_s", "share", "each_costs_ms")
    return {name: median(run[name] for run in runs) for name in names} | {
        "shares": [run["share"] for run in runs]
    }


async def _take_turns(
    trial: Trial, poisons: Sequence[Poison], count: int, runs: dict[str, list[Figures]]
) -> None:
    await trial.pace(_made(count // 5))  # the first second of a service is slow
    for poison in poisons:
        clean = await trial.pace(_made(count))
        async with poison.trap(trial.place):
            mixed = await trial.pace(_made(count), poison)
        share = mixed.rate_per_s / clean.rate_per_s
        runs[poison.name].append(
            {
                "rate_per_s": mixed.rate_per_s,
                "clean_per_s": clean.rate_per_s,
                "share": share,
                "each_costs_ms": (mixed.cpu_us - clean.cpu_us) * count / len(_among(count, poison)) / 1000,
            }
        )
        say(f"{poison.name}: {mixed.rate_per_s:,.0f}/s beside {clean.rate_per_s:,.0f}/s without: {share:.2f}")


def _made(count: int, poison: Poison | None = None) -> list[Made]:
    body = poison.body if poison else lambda message: _request(message, ORDERS)
    headers = (poison.headers if poison else None) or {}
    return [
        (
            message,
            Publication(
                REQUESTS,
                key=message.key,
                properties=encode_properties({RETRY_ID: message.key, **headers}),
                body=body(message),
            ),
        )
        for message in islice(messages({0: DUE_AT_ONCE_MS}), count)
    ]


def _among(count: int, poison: Poison) -> range:
    """Return the places of the poison among so many good ones."""
    return range(min(poison.one_in, count) // 2, count, poison.one_in)


def _mixed(good: Sequence[Made], poison: Poison) -> list[Made]:
    """Return the good ones with the poison spread evenly among them: always one behind the first few."""
    among = _among(len(good), poison)
    spread = dict(zip(among, _made(len(among), poison), strict=True))
    mixed: list[Made] = []
    for place, each in enumerate(good):
        if place in spread:
            mixed.append(spread[place])
        mixed.append(each)
    return mixed


async def _forget(place: Place) -> None:
    """Have nothing left, however often a statement meets the service's in the middle of their rows."""
    for statement in FORGET:
        while True:
            try:
                await _execute(place, statement)
                break
            except asyncpg.DeadlockDetectedError:
                say("what is left is being settled; removing it again")
    await asyncio.to_thread(place.rabbitmq.ctl, "purge_queue", "--vhost", place.name, REVIEW)


async def _execute(place: Place, statements: str) -> None:
    connection = await place.connect()
    try:
        await connection.execute(statements)
    finally:
        await connection.close()


def _rows(figures: Figures) -> list[Row]:
    return [
        Row(
            each["name"],
            f"{each['share']:.2f} of the rate without",
            f"one in {each['one_in']:,}; {each['rate_per_s']:,.0f} beside {each['clean_per_s']:,.0f}/s;"
            f" each costs {each['each_costs_ms']:.1f} ms of processor"
            + ("" if each["share"] >= figures["bound"] else f"; below the promise of {figures['bound']}"),
        )
        for each in figures["poisons"]
    ]


SCENARIO = Scenario("poison", "Good traffic with poison among it", _measure, _rows)
