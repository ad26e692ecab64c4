"""Every error this package raises on purpose, grouped by what its catcher should do.

A driver's exception (asyncpg, pika, pydantic) stops in the module that called the driver.

    RetrySchedulerError
    |-- Unavailable          wait and try again; nothing was lost
    |   |-- StatementRefused     the same; but at the start no waiting helps: UnusableSchema
    |   |-- ContentRefused       the same, and soon: the server is well
    |   `-- DataRefused          the same; but of requests to be stored, find the row and set it aside
    |-- MalformedRequest     this message can never become an attempt; quarantine it
    |-- BadSettings          tell the operator every wrong setting and leave with 78
    |-- UnusableSchema       tell the operator what the database lacks and leave with 78
    `-- PortTaken            tell the operator which port or host and leave with 78
"""

import errno
from collections.abc import Sequence


class RetrySchedulerError(Exception):
    """Anything this package raises on purpose."""


class Unavailable(RetrySchedulerError):
    """A server is away or does not answer in time. Wait and try again; nothing was lost.

    server: "PostgreSQL" or "RabbitMQ".
    """

    def __init__(self, server: str, problem: str) -> None:
        super().__init__(f"{server}: {problem}")
        self.server = server
        self.problem = problem


class StatementRefused(Unavailable):
    """PostgreSQL refuses a statement of ours: a table, a column or a right is missing, or in the way.

    Somebody may be at work on the tables, so a running service waits as for any other outage.
    """

    def __init__(self, server: str, problem: str, *, sqlstate: str) -> None:
        super().__init__(server, problem)
        self.sqlstate = sqlstate


class ContentRefused(Unavailable):
    """RabbitMQ closes a connection over something that was sent through it. Others are not concerned."""


class DataRefused(Unavailable):
    """PostgreSQL refuses a value (SQLSTATE class 22, or 23514).

    Of a request that is a reason to set it aside. A row that is stored has to wait until whoever has added
    the constraint takes it away again.

    sqlstate: the five characters of the SQLSTATE, or "client" where the driver could not encode the value.
    detail: in the server's language; it may show the row, whose values do not belong in a log.
    """

    def __init__(self, problem: str, *, sqlstate: str, detail: str = "") -> None:
        super().__init__("PostgreSQL", f"refuses a value: {problem} (SQLSTATE {sqlstate})")
        self.args = (f"{self.server} {self.problem}",)
        self.sqlstate = sqlstate
        self.detail = detail


class MalformedRequest(RetrySchedulerError):
    """This message can never become an attempt. Set it aside; do not requeue it.

    field: the first field that breaks a rule, or "body" where the JSON as a whole does.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class BadSettings(RetrySchedulerError):
    """Settings are wrong. The program cannot start.

    problems: one line for each wrong setting, each beginning with its name.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class UnusableSchema(RetrySchedulerError):
    """The database's tables are not what this program needs and it may not change them."""


class PortTaken(RetrySchedulerError):
    """A listener's port cannot be bound, or its host is none of this machine's."""

    def __init__(self, setting: str, address: str, cause: OSError) -> None:
        """setting: the one of the port."""
        advice = f"Free it or set {setting}"
        # Below 0 are the resolver's own numbers.
        if cause.errno == errno.EADDRNOTAVAIL or (cause.errno or 0) < 0:
            setting, advice = "HTTP_HOST", "Name an address of this machine"
        super().__init__(f"{setting}: cannot listen on {address}: {cause.strerror or cause}. {advice}.")
