"""Asks the broker whether we may publish, without leaving a message anywhere."""

import asyncio
from uuid import uuid4

from retry_scheduler.broker.confirms import Outcome
from retry_scheduler.broker.connection import CALL_TIMEOUT_S, CONNECT_TIMEOUT_S, SERVER
from retry_scheduler.broker.properties import encode_properties
from retry_scheduler.broker.publication import RETRY_ID, Publication
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.errors import Unavailable


async def require_publishing(url: str, *, name: str) -> None:
    """Return if our user may publish. Raises Unavailable with what the broker says otherwise.

    AMQP has no question for a right. But a mandatory message to a queue that does not exist is returned if
    all is well, and refused as any other would be if not.
    """
    problem: asyncio.Future[Unavailable] = asyncio.get_running_loop().create_future()

    def note(first: Unavailable) -> None:
        if not problem.done():
            problem.set_result(first)

    link = PublishLink(url, queues=(), name=name, on_problem=note)
    running = asyncio.create_task(link.run(), name="permission")
    nowhere = f"retry-scheduler.check.{uuid4()}"
    question = Publication(nowhere, key=nowhere, properties=encode_properties({RETRY_ID: nowhere}), body=b"")
    try:
        await link.wait_until_ready(CONNECT_TIMEOUT_S)
        async with asyncio.timeout(CALL_TIMEOUT_S):
            (outcome,) = await link.publish([question])
            if outcome not in (Outcome.RETURNED, Outcome.CONFIRMED):
                raise await problem
    except TimeoutError as error:
        raise Unavailable(SERVER, "no answer in time to a message") from error
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
