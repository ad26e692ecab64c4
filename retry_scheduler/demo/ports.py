"""Finds free TCP ports for servers that will be stopped and started again on the same port."""

import random
import socket
from pathlib import Path

from retry_scheduler.demo.processes import PrivateServerError

LOOPBACK = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Return `count` different ports on which nobody listens on the loopback address now.

    Nothing is reserved. They lie below the range from which the kernel takes ports for outgoing
    connections: a client that keeps trying a stopped server's port inside that range sooner or later
    gets this very port for its own end, connects to itself, and keeps the server from coming back.
    """
    outgoing = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
    above = int(outgoing.split()[0])
    candidates = random.sample(range(above // 2, above), k=min(1000, above // 2))
    ports = [port for port in candidates[: count * 20] if _is_free(port)][:count]
    if len(ports) < count:
        raise PrivateServerError(f"found only {len(ports)} of {count} free ports")
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: connections of the past in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True
