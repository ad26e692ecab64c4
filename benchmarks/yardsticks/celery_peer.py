"""What one would build instead: a Celery task with an ETA that publishes to the original queue, confirmed.

Late acknowledgement, so that a killed worker loses nothing; no results, no events, no gossip. The
timers live in the worker's memory and the broker holds every waiting message as unacknowledged.
"""

import base64
from typing import Any

from celery import Celery, signals

from benchmarks.yardsticks.celery_message import QUEUE, TASK
from benchmarks.yardsticks.common import READY, URL

# The best of prefork and threads with 2 to 64, and of prefetch 60 to unlimited. With a limit the worker
# raises it by one for each task that waits, a round trip each; so the limit would not hold anyway.
POOL = "threads"
CONCURRENCY = 8
PREFETCH_EACH = 0

app = Celery("bench", broker=URL)
app.conf.update(
    task_default_queue=QUEUE,
    task_acks_late=True,
    task_ignore_result=True,
    task_store_eager_result=False,
    worker_send_task_events=False,
    worker_prefetch_multiplier=PREFETCH_EACH,
    worker_concurrency=CONCURRENCY,
    worker_pool=POOL,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"confirm_publish": True},
)


def redeliver(message_id: str, retry_count: int, queue: str, payload: str) -> None:
    """Publish one message and wait for the confirm."""
    with app.producer_or_acquire() as producer:
        producer.publish(
            base64.b64decode(payload),
            exchange="",
            routing_key=queue,
            content_type="application/octet-stream",
            content_encoding="binary",
            delivery_mode=2,
            mandatory=True,
            message_id=message_id,
            headers={"x-retry-id": f"{message_id}:{retry_count}", "x-retry-count": retry_count + 1},
        )


app.task(name=TASK)(redeliver)


def _say_ready(**_: Any) -> None:
    print(READY, flush=True)


if __name__ == "__main__":
    signals.worker_ready.connect(_say_ready, weak=False)
    quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    app.worker_main(["worker", "--loglevel=WARNING", *quiet])
