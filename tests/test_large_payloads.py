"""A payload that takes longer to move than a statement may take otherwise."""

from collections import Counter
from datetime import timedelta

import pytest

from chaos.proxy import proxies
from tests.factories import encoded, make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import Load, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

MIB = 1024 * 1024
THE_PROMISE = timedelta(seconds=5)


@pytest.mark.timeout(180)
async def test_a_payload_that_takes_longer_than_a_statement_may_arrives_and_delays_no_other(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    payload = bytes(range(256)) * (40 * 1024 * 4)
    upstream.declare("orders", "large")
    others = ((message_id, make_request(message_id=message_id)) for message_id in iter(new_id, ""))
    with proxies(table.database.port) as (to_postgres,):
        service = await start_service(POSTGRES_PORT=str(to_postgres.port), RABBITMQ_PREFETCH="100")
        to_postgres.slow_down(bytes_per_s=4 * MIB)  # ten seconds each way
        upstream.ask(
            make_request(original_payload=encoded(payload), original_queue="large", retry_after_ms=2000)
        )
        await eventually(
            lambda: table.value("SELECT count(*) = 1 FROM retry_queue"), within=timedelta(seconds=40)
        )
        with Load(upstream, others, per_second=50) as load:
            await upstream.filled("large", 1, within=timedelta(seconds=40))
        await eventually(table.settled)
        reconnects = service.metrics().value("retry_reconnects_total")
        unknown = service.metrics().value("retry_publications_unknown_total")

    (large,) = upstream.take("large")
    slowest = await table.value(
        "SELECT max(finished_at - next_retry_at) FROM retry_queue WHERE original_queue = 'orders'"
    )
    assert large.body == payload
    assert len(load.accepted) > 100
    assert slowest < THE_PROMISE
    assert Counter(message.message_id for message in upstream.take("orders")) == dict.fromkeys(
        load.accepted, 1
    )
    assert (reconnects, unknown) == (0, 0)
