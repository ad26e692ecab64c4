"""The chaos test's link faults, on a proxy before a server that sends back whatever it gets."""

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic

import pytest

from chaos.link_faults import LINK_FAULTS
from chaos.proxy import Proxy
from retry_scheduler.demo.ports import LOOPBACK

# Long enough for a healthy link to answer many times.
SILENT_S = 0.3
ANSWERS_WITHIN_S = 5.0

SILENT = ("silence", "mute", "deafen", "forget")
CUTTING = ("reset", "refuse", "cut")
SLOW = ("delay", "throttle")

# More than a throttled link passes within SILENT_S, and than is sent before any cut.
MUCH = bytes(200_000)


@pytest.fixture
def link() -> Iterator[Proxy]:
    with socket.create_server((LOOPBACK, 0)) as listener:
        threading.Thread(target=_echo_all, args=(listener,), daemon=True).start()
        with Proxy(listener.getsockname()[1]) as proxy:
            yield proxy


def _echo_all(listener: socket.socket) -> None:
    with suppress(OSError):  # the test is over
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_echo, args=(client,), daemon=True).start()


def _echo(client: socket.socket) -> None:
    with client, suppress(OSError):
        while data := client.recv(65536):
            client.sendall(data)


def connect(link: Proxy) -> socket.socket:
    return socket.create_connection((LOOPBACK, link.port), timeout=ANSWERS_WITHIN_S)


def echo_s(connection: socket.socket, message: bytes = b"ping") -> float:
    """Return how long the same took to come back. Raises OSError if it does not."""
    began = monotonic()
    threading.Thread(target=_send, args=(connection, message), daemon=True).start()
    got = 0
    while got < len(message):
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionResetError("closed")
        got += len(piece)
    return monotonic() - began


def _send(connection: socket.socket, message: bytes) -> None:
    with suppress(OSError):
        connection.sendall(message)


def test_every_link_fault_is_told_here() -> None:
    assert {*SILENT, *CUTTING, *SLOW} == LINK_FAULTS.keys()


@pytest.mark.parametrize("fault", SILENT)
def test_a_silent_link_keeps_its_connections_and_moves_nothing(link: Proxy, fault: str) -> None:
    with connect(link) as connection:
        echo_s(connection)

        LINK_FAULTS[fault](link, random.Random(1))

        connection.settimeout(SILENT_S)
        with pytest.raises(TimeoutError):
            echo_s(connection)
    link.heal()
    with connect(link) as connection:
        echo_s(connection)


@pytest.mark.parametrize("fault", CUTTING)
def test_a_link_that_cuts_resets_its_connections_and_takes_new_ones_when_it_is_healed(
    link: Proxy, fault: str
) -> None:
    with connect(link) as connection:
        echo_s(connection)

        LINK_FAULTS[fault](link, random.Random(1))

        with pytest.raises(ConnectionResetError):
            echo_s(connection, MUCH)
    link.heal()
    with connect(link) as connection:
        echo_s(connection)


@pytest.mark.parametrize("fault", SLOW)
def test_a_slow_link_only_delays(link: Proxy, fault: str) -> None:
    with connect(link) as connection:
        echo_s(connection)

        LINK_FAULTS[fault](link, random.Random(1))

        slow_s = echo_s(connection, MUCH)
        link.heal()
        assert slow_s > SILENT_S
        assert echo_s(connection, MUCH) < slow_s


def test_a_delay_holds_up_what_is_under_way_side_by_side_and_not_piece_by_piece(link: Proxy) -> None:
    with connect(link) as connection:
        echo_s(connection)
        link.slow_down(latency_s=0.2)

        # A dozen pieces, each way: one after the other they would take 5 s.
        assert 0.4 <= echo_s(connection, MUCH) < 2.0


def test_a_forgotten_connection_is_cut_when_the_link_is_healed(link: Proxy) -> None:
    with connect(link) as connection:
        echo_s(connection)
        link.forget()
        with connect(link) as another:
            echo_s(another)
            link.heal()

            echo_s(another)
            with pytest.raises(ConnectionResetError):
                echo_s(connection)
