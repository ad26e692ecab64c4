"""Where a retry may not go: to the broker's own queues and to ours, however their names are written."""

from tests.factories import make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

DENIED = [
    RETRY_QUEUE,
    REVIEW_QUEUE,
    "amq.rabbitmq.reply-to",
    "amq.rabbitmq.reply-to.g1h2.x",
    "amq.",
    "amq.gen-1",
]

# Not denied, because they are other names; nobody on the way may turn them into those above.
NEARLY_DENIED = [
    *(f"{RETRY_QUEUE}{end}" for end in ("\n", "\r\n", " ", ".", "\u200b", "#", "%00")),
    *(f"{start}{RETRY_QUEUE}" for start in ("\n", " ", "/", "\ufeff", "//")),
    *(RETRY_QUEUE.upper(), RETRY_QUEUE.replace("e", "\u0435"), RETRY_QUEUE.replace(".", "\u2024")),
    *(f"{REVIEW_QUEUE}\r\n", "\namq.rabbitmq.reply-to", "AMQ.rabbitmq.reply-to", "*", "#", ".*"),
]


async def test_requests_for_denied_queues_go_to_people_and_nothing_arrives_there(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(MAX_PUBLISH_FAILURES="1")
    ids = [new_id() for _ in NEARLY_DENIED]

    upstream.ask(*(make_request(original_queue=queue) for queue in DENIED))
    upstream.ask(
        *(
            make_request(message_id=message_id, original_queue=queue)
            for message_id, queue in zip(ids, NEARLY_DENIED, strict=True)
        )
    )
    reviews = await upstream.receive(REVIEW_QUEUE, len(DENIED) + len(NEARLY_DENIED))
    await eventually(table.settled)

    reasons = [message.review["reason"] for message in reviews]
    assert sorted(reasons) == ["malformed"] * len(DENIED) + ["unroutable"] * len(NEARLY_DENIED)
    denied = [
        message.review["error_reason"] for message in reviews if message.review["reason"] == "malformed"
    ]
    assert all(text.startswith("original_queue: ") for text in denied)
    assert {message.message_id for message in reviews if message.review["reason"] == "unroutable"} == set(ids)
    metrics = service.metrics()
    assert metrics.value("retry_quarantined_total", reason="original_queue") == len(DENIED)
    assert metrics.value("retries_executed_total", status="success") == 0
    # A retry that came back to us would have been taken for a request.
    assert metrics.value("retry_quarantined_total") == len(DENIED)
    assert metrics.value("retries_scheduled_total") == len(NEARLY_DENIED)
    assert upstream.depth(RETRY_QUEUE) == 0
