"""How large a message the broker takes, as far as it has said.

RabbitMQ closes the channel over a message above its `max_message_size`, and names that limit. AMQP has no
way to ask for it, and an operator may change it. So what it has said is remembered and shared by all
links, until something larger is confirmed after all: only the first message that is too large costs a
connection that carries others.
"""

import re

# rabbit_channel.erl, check_msg_size; the same words from 3.8 to 4.1. In others we would not recognise them,
# and suspect everything that was outstanding.
_TOO_LARGE = re.compile(r"message size \d+ is larger than (?:configured )?max size (\d+)")


class SizeLimit:
    """What one broker has said to all who publish to it."""

    def __init__(self) -> None:
        self._limit_bytes: int | None = None

    def learn(self, reason: str) -> int | None:
        """Note why a channel was closed. Returns the limit in bytes, None if it was not over the size."""
        said = _TOO_LARGE.search(reason)
        if said is None:
            return None
        self._limit_bytes = int(said[1])
        return self._limit_bytes

    @property
    def known(self) -> bool:
        """Whether the broker has refused something over its size, and taken nothing larger since."""
        return self._limit_bytes is not None

    def admits(self, body_bytes: int) -> bool:
        """Whether the broker may take a body of this size."""
        return self._limit_bytes is None or body_bytes <= self._limit_bytes

    def confirmed(self, body_bytes: int) -> None:
        """Note that a body of this size was taken: what was said before may hold no more."""
        if not self.admits(body_bytes):
            self._limit_bytes = None
