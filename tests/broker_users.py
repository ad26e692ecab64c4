"""Users of a private RabbitMQ with the rights that a test gives them."""

from collections.abc import Iterator
from contextlib import contextmanager

from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ

_USERS = "rabbit_auth_backend_internal"


@contextmanager
def broker_user(
    rabbitmq: PrivateRabbitMQ, vhost: str, name: str, password: str, *, configure: str, write: str, read: str
) -> Iterator[None]:
    """A user with these rights, regular expressions, in one virtual host, as long as the block lasts."""
    acting = _binary("tests")
    rabbitmq.eval(f"{_USERS}:add_user({_binary(name)}, {_binary(password)}, {acting}).")
    try:
        grant(rabbitmq, vhost, name, configure=configure, write=write, read=read)
        yield
    finally:
        rabbitmq.eval(f"{_USERS}:delete_user({_binary(name)}, {acting}).")


def grant(rabbitmq: PrivateRabbitMQ, vhost: str, name: str, *, configure: str, write: str, read: str) -> None:
    """Give a user these rights instead of those it has."""
    given = ", ".join(_binary(text) for text in (name, vhost, configure, write, read, "tests"))
    rabbitmq.eval(f"{_USERS}:set_permissions({given}).")


def _binary(text: str) -> str:
    return f"<<{','.join(str(byte) for byte in text.encode())}>>"
