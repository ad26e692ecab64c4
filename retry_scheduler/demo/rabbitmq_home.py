"""Lays out the folder of a private RabbitMQ node: configuration, secrets, environment of its programs.

Everything that would otherwise come from, or go to, the places of the system's node is named here.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.demo.processes import PrivateServerError, ServerMissing

# The inner scripts. Those in /usr/sbin change to the user and the folders of the system's node.
SCRIPTS = Path("/usr/lib/rabbitmq/bin")
INSTALL_COMMAND = "apt-get install --no-install-recommends rabbitmq-server"

COMMAND_TAKES = timedelta(seconds=30)

SETTINGS = {
    "log.console": "false",
    "log.file": "rabbitmq.log",
    # Absolute, so that tests behave alike on a small and a big machine. Beyond them publishers are blocked.
    "vm_memory_high_watermark.absolute": "2GB",
    "disk_free_limit.absolute": "50MB",
}


@dataclass(frozen=True)
class Ports:
    """The ports a node listens on, all on the loopback address."""

    amqp: int
    management: int
    distribution: int  # Erlang machines among each other: rabbitmqctl, erl_call
    epmd: int  # tells them each other's distribution port


@dataclass(frozen=True)
class RabbitMQHome:
    """The folder of one node, and how its programs are called so that they keep to it."""

    folder: Path
    ports: Ports

    @classmethod
    def set_up(cls, folder: Path, settings: Mapping[str, str]) -> "RabbitMQHome":
        """Write all files that a first start needs, and choose the ports.

        settings: lines of rabbitmq.conf; they win over SETTINGS.
        Raises ServerMissing if RabbitMQ's package is not installed.
        """
        find_program("rabbitmq-server")
        folder.mkdir(parents=True, exist_ok=True)
        home = cls(folder, Ports(*free_ports(4)))
        cookie = folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.touch(mode=0o600)
            cookie.write_text(secrets.token_hex(20), encoding="ascii")
            cookie.chmod(0o400)  # Erlang refuses one that others could read
        lines = {
            "listeners.tcp.1": f"{LOOPBACK}:{home.ports.amqp}",
            "management.tcp.ip": LOOPBACK,
            "management.tcp.port": str(home.ports.management),
            **SETTINGS,
            **settings,
        }
        text = "".join(f"{name} = {value}\n" for name, value in lines.items())
        (folder / "rabbitmq.conf").write_text(text, encoding="utf-8")
        (folder / "enabled_plugins").write_text("[rabbitmq_management].\n", encoding="ascii")
        (folder / "env.conf").write_text("", encoding="ascii")
        return home

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of the node, of epmd and of the command line tools."""
        loopback_only = "-kernel inet_dist_use_interface {127,0,0,1}"
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C.UTF-8",
            "HOME": str(self.folder),  # for the cookie
            "ERL_EPMD_PORT": str(self.ports.epmd),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_CRASH_DUMP_SECONDS": "0",  # none: writing it would delay a restart
            # The port in the name tells nodes apart; "localhost" needs no name service.
            "RABBITMQ_NODENAME": f"private-{self.ports.epmd}@localhost",
            "RABBITMQ_DIST_PORT": str(self.ports.distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": loopback_only,
            "RABBITMQ_CTL_ERL_ARGS": loopback_only,
            "RABBITMQ_CTL_DIST_PORT_MIN": "0",  # the kernel's choice, so that calls can overlap
            "RABBITMQ_CTL_DIST_PORT_MAX": "0",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(self.folder / "conf.d"),  # not there; unset it would be the system's
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),  # the same
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_PID_FILE": str(self.folder / "node.pid"),
            # The start script becomes the Erlang machine, instead of waiting for one as a shell between us.
            "RABBITMQ_ALLOW_INPUT": "true",
            "RABBITMQ_SERVER_START_ARGS": "-noinput",
        }

    def run(self, program: str, *arguments: str, input_text: str = "") -> str:
        """Run a command line tool against the node and return its output.

        Raises PrivateServerError if it fails or takes longer than COMMAND_TAKES.
        """
        try:
            done = subprocess.run(
                [find_program(program), *arguments],
                cwd=self.folder,
                env=self.environment,
                input=input_text,
                capture_output=True,
                text=True,
                check=False,
                timeout=COMMAND_TAKES.total_seconds(),
            )
        except subprocess.TimeoutExpired as error:
            raise PrivateServerError(
                f"{program}: no answer in {COMMAND_TAKES.total_seconds():g} s"
            ) from error
        if done.returncode != 0:
            raise PrivateServerError(f"{program}: {done.stderr.strip()} {done.stdout.strip()}")
        return done.stdout


def find_program(name: str) -> str:
    """Return the path of one of RabbitMQ's scripts or Erlang's programs.

    Raises ServerMissing if it is not installed.
    """
    found = shutil.which(name, path=SCRIPTS) or shutil.which(name)
    # A rabbitmq-server elsewhere is the system's wrapper, or one built in a way we do not know.
    if found is None or (name.startswith("rabbitmq") and Path(found).parent != SCRIPTS):
        raise ServerMissing(f"{name} is missing. Install RabbitMQ as root: {INSTALL_COMMAND}")
    return found
