"""What faults break: the servers, the instances, and the links between them."""

from collections.abc import Sequence
from dataclasses import dataclass

from chaos.bed import Place
from chaos.instance import Instance
from chaos.links import Links


@dataclass(frozen=True)
class Stage:
    """What a fault may break. links: one for each instance, in their order."""

    place: Place
    instances: Sequence[Instance]
    links: Sequence[Links]

    def heal_all(self) -> None:
        """Whatever was done, and whatever state it is in: everything runs, nothing is frozen or blocked."""
        for server in (self.place.postgres, self.place.rabbitmq):
            server.thaw()
            if not server.is_running:
                server.start()
        self.lift_alarm()
        for links in self.links:
            links.heal()
        for instance in self.instances:
            instance.thaw()
            if not instance.is_running:
                instance.start()

    def lift_alarm(self) -> None:
        """End the broker's alarm, if there is one."""
        self.place.rabbitmq.ctl("set_disk_free_limit", "50MB")
