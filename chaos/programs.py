"""The programs around the service: an upstream, consumers that fail now and then, and people.

Closed loops: each sends its next message when it knows what became of the last, and a consumer
acknowledges a message when it is in the log and its next attempt, if it fails, is in the retry queue.
"""

import base64
import json
import random
import threading
from collections.abc import Mapping
from typing import Any

from chaos.amqp import PAUSE_S, QueueConsumer, Upstream
from chaos.oplog import OperationLog
from chaos.requests import MIX, REVIEW_QUEUE, RequestMix, make_request, sha256

FAILS_WITH_PROBABILITY = 0.4


class Generator:
    """One upstream, at most `per_second` requests."""

    def __init__(
        self,
        url: str,
        log: OperationLog,
        *,
        name: str,
        dice: random.Random,
        per_second: float,
        mix: Mapping[str, float] = MIX,
    ) -> None:
        self._upstream = Upstream(url, log, name)
        self._requests = RequestMix(dice, mix)
        self._pause_s = 1 / per_second
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it still sends, or has died of an error."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Send no more, and wait for what is being sent."""
        self._stop.set()
        self._thread.join(timeout=60)

    def _work(self) -> None:
        while not self._stop.wait(self._pause_s):
            for request in self._requests.next():
                if self._upstream.enqueue(request) == "fail":
                    self._stop.wait(PAUSE_S)
        self._upstream.close()


class Worker(QueueConsumer):
    """The consumer of an original queue. It fails at random, and asks for the next attempt then."""

    def __init__(self, url: str, log: OperationLog, *, queue: str, seed: str) -> None:
        super().__init__(url, queue)
        self._log = log
        self._seed = seed
        self._upstream = Upstream(url, log, f"worker of {queue}")

    def handle(self, body: bytes, properties: Any, *, redelivered: bool) -> None:
        """Log the message, and with some probability ask for its next attempt until that is confirmed."""
        headers = properties.headers or {}
        retry_id = str(headers.get("x-retry-id"))
        self._log.write(
            "deliver",
            "ok",
            queue=self._queue,
            retry_id=retry_id,
            message_id=properties.message_id,
            retry_count=headers.get("x-retry-count"),
            sha256=sha256(body),
            redelivered=redelivered,
        )
        # Of the message and not of the moment: delivered twice, it fails twice.
        if random.Random(f"{self._seed} {retry_id}").random() >= FAILS_WITH_PROBABILITY:
            return
        again = make_request(
            "next",
            message_id=properties.message_id,
            payload=body,
            queue=self._queue,
            retry_count=int(headers["x-retry-count"]),
        )
        while self._upstream.enqueue(again) != "ok" and not self._stop.wait(PAUSE_S):
            pass

    def idle(self) -> None:
        """Keep the upstream's connection alive."""
        self._upstream.answer_heartbeats()


class ReviewSink(QueueConsumer):
    """The people: whoever reads the manual review queue."""

    def __init__(self, url: str, log: OperationLog) -> None:
        super().__init__(url, REVIEW_QUEUE)
        self._log = log

    def handle(self, body: bytes, properties: Any, *, redelivered: bool) -> None:
        """Log the message."""
        review = json.loads(body)
        payload = review["original_payload"]
        self._log.write(
            "review",
            "ok",
            retry_id=str((properties.headers or {}).get("x-retry-id")),
            reason=review["reason"],
            message_id=review["message_id"],
            retry_count=review["retry_count"],
            sha256=None if payload is None else sha256(base64.b64decode(payload)),
            redelivered=redelivered,
        )
