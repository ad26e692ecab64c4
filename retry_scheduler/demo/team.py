"""A team's programs: one that sends invoices, a consumer that fails on some, and what asks for retries.

This is what a team writes to use the service, in the order that loses nothing: handle a message; if
that fails, publish a retry request and wait for the confirm; acknowledge only then. The contract is in
`retry_request`.
"""

import asyncio
import base64
import json
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NoReturn

from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.broker.intake_link import Delivery as Message
from retry_scheduler.broker.intake_link import IntakeLink
from retry_scheduler.broker.properties import encode_properties, header_entries, text_headers
from retry_scheduler.broker.publication import RETRY_ID, Publication
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.demo.evidence import Delivery
from retry_scheduler.demo.invoices import Invoice
from retry_scheduler.errors import Unavailable

ORDERS = "orders"

# Quick enough that the longest story, 2 + 4 + 8 s, begins early; slow enough to see them come.
PAUSE_S = 0.06

PREFETCH = 20


class Team:
    """deliveries: each message that the consumer got. sent: by id, what the broker has confirmed."""

    def __init__(self, url: str, retry_queue: str, invoices: Sequence[Invoice]) -> None:
        self.deliveries: list[Delivery] = []
        self.sent: dict[str, Invoice] = {}
        self._invoices = {invoice.message_id: invoice for invoice in invoices}
        self._retry_queue = retry_queue
        self._intake = IntakeLink(
            url, queue=ORDERS, queues=(ORDERS,), prefetch=PREFETCH, name="demo: consumer", on_problem=give_up
        )
        self._link = PublishLink(url, queues=(ORDERS,), name="demo: upstream", on_problem=give_up)
        self._arrived: asyncio.Queue[tuple[datetime, list[Message]]] = asyncio.Queue()

    async def run(self) -> None:
        """Consume until cancelled. Raises an ExceptionGroup of Unavailable if the broker goes away."""
        async with asyncio.TaskGroup() as tasks:
            for work in (self._intake.run(), self._link.run(), self._receive(), self._handle()):
                tasks.create_task(work)

    async def send(self) -> None:
        """Send all invoices to the queue `orders`, one after the other. Raises Unavailable."""
        while not self._link.ready:  # noqa: ASYNC110  once, and for milliseconds
            await asyncio.sleep(0.01)
        for invoice in self._invoices.values():
            await self._publish([_publication(ORDERS, f"{invoice.message_id}:sent", invoice.body)])
            self.sent[invoice.message_id] = invoice
            await asyncio.sleep(PAUSE_S)

    async def _receive(self) -> None:
        # Apart from the handling, so that an arrival is noted when it happens.
        while True:
            batch = await self._intake.take()
            self._arrived.put_nowait((datetime.now(UTC), batch))

    async def _handle(self) -> None:
        while True:
            arrived_at, batch = await self._arrived.get()
            requests = []
            for message in batch:
                key = text_headers(message.properties, (RETRY_ID,)).get(RETRY_ID, "")
                message_id = key.rpartition(":")[0]
                retry_count = retry_count_in(message.properties)
                invoice = self._invoices.get(message_id)
                fails = invoice is not None and retry_count < invoice.fails
                self.deliveries.append(Delivery(message_id, retry_count, arrived_at, not fails, message.body))
                if invoice is not None and fails:
                    request = retry_request(invoice, message.body, retry_count)
                    requests.append(_publication(self._retry_queue, f"{message_id}:{retry_count}", request))
            await self._publish(requests)
            self._intake.acknowledge(batch)

    async def _publish(self, publications: Sequence[Publication]) -> None:
        outcomes = await self._link.publish(publications)
        if any(outcome is not Outcome.CONFIRMED for outcome in outcomes):
            raise Unavailable("RabbitMQ", f"did not take what the demo's team sent: {outcomes}")


def retry_request(invoice: Invoice, payload: bytes, retry_count: int) -> bytes:
    """Return the body that asks for a retry of a message, as the contract says.

    retry_count: what the failed message carried as x-retry-count; 0 if it had none.
    """
    coded: object = base64.b64encode(payload).decode()
    if invoice.number.endswith(("2", "5", "8")):
        coded = {"type": "Buffer", "data": list(payload)}  # what Node.js makes of a Buffer
    if invoice.malformed:
        coded = payload.decode()  # forgot to encode it
    return json.dumps(
        {
            "message_id": invoice.message_id,
            "original_queue": ORDERS,
            "original_payload": coded,
            "error_reason": invoice.reason,
            "retry_count": retry_count,
        }
    ).encode()


def retry_count_in(properties: bytes) -> int:
    """Return the number in the header x-retry-count, 0 without it. properties: encoded, as they came."""
    try:
        for name, tag, value in header_entries(properties):
            if name == b"x-retry-count" and tag == b"l":  # a signed 64-bit integer, as the contract says
                return int.from_bytes(value, "big", signed=True)
    except (struct.error, IndexError, ValueError):  # somebody else's message: it has no such header
        pass
    return 0


def give_up(problem: Unavailable) -> NoReturn:
    """End the demo: its broker is its own, so there is nothing to wait for."""
    raise problem


def _publication(queue: str, key: str, body: bytes) -> Publication:
    # The link knows what it has sent by this header; on a retry it is the service's.
    properties = encode_properties({RETRY_ID: key}, content_type="application/json")
    return Publication(queue, key=key, properties=properties, body=body)
