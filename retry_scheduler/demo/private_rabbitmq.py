"""Runs a RabbitMQ node of our own in one folder, from the files of the system's rabbitmq-server package.

The system's own node, its cookie, its ports, its epmd and its folders are neither used nor touched, and
any number of private nodes can run beside it. Needs no root.
"""

import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote
from urllib.request import Request, urlopen

from retry_scheduler.demo.ports import LOOPBACK
from retry_scheduler.demo.processes import PrivateServerError, ServerProcess
from retry_scheduler.demo.rabbitmq_home import COMMAND_TAKES, Ports, RabbitMQHome, find_program

# Normally 3 to 4 s, and a multiple of that on a machine that is busy with other things.
START_TAKES = timedelta(seconds=120)
STOP_TAKES = timedelta(seconds=30)

# What SIGTERM does, without 6 s of waiting: the management plugin's event handler asks the application
# controller for something while that waits for the handler to end, until a timeout parts them. After
# rabbit:stop() all data is on disk and closed, and the rest of the Erlang machine can be killed.
STOP_BROKER = "gen_event:delete_handler(rabbit_event, rabbit_mgmt_db_handler, stop), rabbit:stop()."

PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"


class PrivateRabbitMQ:
    """A RabbitMQ node on 127.0.0.1 with its data, logs and secrets in `folder`.

    folder: created if it is missing. It keeps queues and messages over stop, kill and start.
    settings: more lines for rabbitmq.conf; they win over those of rabbitmq_home.

    The ports are chosen at the first start and stay the same at each later one. The only user is
    guest, password guest, with all rights; only this machine can connect.
    """

    host = LOOPBACK

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._settings = settings or {}
        self._parts: _Parts | None = None

    def __enter__(self) -> Self:
        """Start the node; leaving the block stops it."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the node."""
        self.stop()

    @property
    def port(self) -> int:
        """The AMQP port. Raises PrivateServerError before the first start."""
        return self._ports.amqp

    @property
    def pid(self) -> int:
        """The Erlang machine's process id. Raises PrivateServerError before the first start."""
        return self._started_parts().node.pid

    @property
    def is_running(self) -> bool:
        """Whether the node was started and has not ended since. A frozen one is running."""
        return self._parts is not None and self._parts.node.is_alive

    @property
    def management_url(self) -> str:
        """Address of the web page, without a slash at its end. Log in as guest, password guest."""
        return f"http://{LOOPBACK}:{self._ports.management}"

    def url(self, vhost: str = "/") -> str:
        """Return the AMQP address of a virtual host."""
        return f"amqp://guest:guest@{LOOPBACK}:{self.port}/{quote(vhost, safe='')}"

    def start(self) -> None:
        """Start the node, on the data that is there or on none, and return when it accepts connections.

        Raises ServerMissing without the rabbitmq-server package, and PrivateServerError if the node does
        not come up, with the end of its output.
        """
        if self._parts is None:
            self._parts = _Parts.set_up(self._folder, self._settings)
        epmd, node = self._parts.epmd, self._parts.node
        if node.is_alive:
            raise PrivateServerError(f"RabbitMQ is running already, process {node.pid}")
        try:
            epmd.kill()  # a node that ended by itself may still be listed in it
            epmd.start()
            # Without one that answers, the node would start a second one, which nobody would ever stop.
            epmd.wait_until_serving(lambda: _listens(self._ports.epmd), within=START_TAKES)
            node.start()
            node.wait_until_serving(self._greets, within=START_TAKES)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Shut down in order, everything written to disk. Harmless if stopped."""
        if self._parts is None:
            return
        node = self._parts.node
        if node.is_alive:
            node.thaw()
            with suppress(PrivateServerError):  # then SIGTERM has to do
                self.eval(STOP_BROKER)
                node.kill()
        node.stop(within=STOP_TAKES)
        self._parts.epmd.kill()

    def kill(self) -> None:
        """Crash: SIGKILL to the Erlang machine. Harmless if stopped."""
        if self._parts is not None:
            self._parts.node.kill()
            self._parts.epmd.kill()

    def freeze(self) -> None:
        """Stop the node where it is: a peer that is silent, on connections that stay open."""
        self._started_parts().node.freeze()

    def thaw(self) -> None:
        """Let a frozen node go on. Harmless if it is not frozen."""
        if self._parts is not None:
            self._parts.node.thaw()

    def add_vhost(self, name: str) -> None:
        """Create a virtual host that guest may use. Harmless if it exists."""
        self._management("PUT", f"/api/vhosts/{quote(name, safe='')}")

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it. Raises PrivateServerError if it is missing."""
        self._management("DELETE", f"/api/vhosts/{quote(name, safe='')}")

    def queue_depth(self, vhost: str, queue: str) -> int:
        """Return how many messages the queue holds now, ready and unacknowledged together.

        Asks the queue itself: the numbers of the management API are up to 5 s old.
        Raises PrivateServerError if there is no such queue.
        """
        name = f"rabbit_misc:r({_binary(vhost)}, queue, {_binary(queue)})"
        found = self.eval(
            f"case rabbit_amqqueue:lookup({name}) of"
            " {ok, Queue} -> proplists:get_value(messages, rabbit_amqqueue:info(Queue, [messages]));"
            " {error, not_found} -> missing end."
        )
        if not found.isdigit():
            raise PrivateServerError(f"no queue {queue!r} in virtual host {vhost!r}")
        return int(found)

    def eval(self, expression: str) -> str:
        """Evaluate Erlang in the node, and return the result as Erlang prints it; some milliseconds.

        The expression ends with a full stop. Raises PrivateServerError if it fails.
        """
        address = f"{LOOPBACK}:{self._ports.distribution}"
        said = self._started_parts().home.run(
            "erl_call", "-r", "-address", address, "-e", input_text=expression + "\n"
        )
        kind, _, result = said.strip().removeprefix("{").removesuffix("}").partition(", ")
        if kind != "ok":
            raise PrivateServerError(f"eval: {said}")
        return result

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl against the node and return its output; takes some tenths of a second.

        Raises PrivateServerError if it fails.
        """
        return self._started_parts().home.run("rabbitmqctl", "--quiet", *arguments)

    def _greets(self) -> bool:
        # The AMQP port opens last in the node's start: after queues are recovered and plugins are up.
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=1) as connection:
                connection.sendall(PROTOCOL_HEADER)
                return connection.recv(1) == b"\x01"  # a method frame: Connection.Start
        except OSError:
            return False

    def _management(self, method: str, path: str) -> None:
        request = Request(self.management_url + path, method=method)
        request.add_header("Authorization", "Basic Z3Vlc3Q6Z3Vlc3Q=")  # guest:guest
        try:
            with urlopen(request, timeout=COMMAND_TAKES.total_seconds()):
                pass
        except OSError as error:  # URLError and HTTPError are OSErrors
            raise PrivateServerError(f"{method} {path}: {error}") from error

    @property
    def _ports(self) -> Ports:
        return self._started_parts().home.ports

    def _started_parts(self) -> "_Parts":
        if self._parts is None:
            raise PrivateServerError("RabbitMQ was never started")
        return self._parts


@dataclass(frozen=True)
class _Parts:
    """What exists from the first start on."""

    home: RabbitMQHome
    epmd: ServerProcess
    node: ServerProcess

    @classmethod
    def set_up(cls, folder: Path, settings: Mapping[str, str]) -> "_Parts":
        home = RabbitMQHome.set_up(folder, settings)
        # epmd in the foreground, as our child. Left to itself it would outlive node and owner.
        epmd, node = (
            ServerProcess(
                command=[find_program(program)],
                folder=folder,
                output=folder / f"{program}.out",
                environment=home.environment,
            )
            for program in ("epmd", "rabbitmq-server")
        )
        return cls(home, epmd, node)


def _listens(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


def _binary(text: str) -> str:
    return f"<<{','.join(str(byte) for byte in text.encode())}>>"
