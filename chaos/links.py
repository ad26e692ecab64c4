"""One instance's links to both servers, each through a proxy: it can be cut off while others are not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from chaos.bed import Place
from chaos.proxy import Proxy


@dataclass(frozen=True)
class Links:
    """The links of one instance, over all its restarts."""

    broker: Proxy
    database: Proxy

    def settings(self, place: Place) -> dict[str, str]:
        """Return the settings with which the service goes through them."""
        return place.settings(postgres_port=self.database.port, rabbitmq_port=self.broker.port)

    def heal(self) -> None:
        """Pass everything on."""
        self.broker.heal()
        self.database.heal()


@contextmanager
def links(place: Place) -> Iterator[Links]:
    """Open an instance's links until the block ends."""
    with Proxy(place.rabbitmq.port) as broker, Proxy(place.postgres.port) as database:
        yield Links(broker, database)
