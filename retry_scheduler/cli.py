"""The command line: `retry-scheduler run | migrate | check | status | archive | demo`.

Exit codes (sysexits.h): 0 good, 64 usage, 69 a server is away, 70 a bug, 78 bad configuration,
130 interrupted.
Heavy imports stand inside the commands, so that --help is quick.
"""

import gc
import os
import sys
from collections.abc import Coroutine
from io import FileIO
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
import uvloop

from retry_scheduler import __version__
from retry_scheduler.errors import BadSettings, PortTaken, Unavailable, UnusableSchema
from retry_scheduler.exit_codes import EX_CONFIG, EX_INTERRUPTED, EX_OK, EX_SOFTWARE, EX_UNAVAILABLE, EX_USAGE

if TYPE_CHECKING:  # heavy, and not needed for --help
    from retry_scheduler.database import Database
    from retry_scheduler.observability.tracing import Tracing
    from retry_scheduler.settings import Settings

AsJson = Annotated[bool, cyclopts.Parameter(name="--json", negative="", help="Print one JSON document.")]

app = cyclopts.App(
    name="retry-scheduler",
    help="Keeps failed RabbitMQ messages in PostgreSQL and sends each back when its next attempt is due.",
    version=__version__,
    help_epilogue="Settings come from the environment; `retry-scheduler check` tells whether they work.",
)


@app.command
def run(
    *,
    paused: Annotated[
        bool,
        cyclopts.Parameter(negative="", help="Send nothing until SIGUSR1: after a restore from a backup."),
    ] = False,
) -> int:
    """Run the service until SIGTERM. Waits for its servers; creates missing tables and queues."""
    from retry_scheduler.observability.logs import flush_logs, set_up_logs
    from retry_scheduler.service import serve
    from retry_scheduler.settings import load_settings
    from retry_scheduler.supervision import ServiceManager

    settings = load_settings(os.environ)
    if paused:
        settings = settings.model_copy(update={"start_paused": True})
    set_up_logs(settings.log_level, service=settings.service_name)
    tracing = _start_tracing(settings)
    # Batches make thousands of objects that reference counting frees by itself. With Python's own
    # thresholds, looking for cycles among them took 6 % of the time.
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    try:
        manager = ServiceManager.named_by(os.environ)
        return _run(serve(settings, manager, load=lambda: load_settings(os.environ), tracing=tracing))
    finally:
        flush_logs()


@app.command
def migrate(
    *,
    sql: Annotated[
        bool, cyclopts.Parameter(negative="", help="Print the SQL for a DBA to run, and connect to nothing.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Create or update the tables. Safe to repeat, and beside running instances."""
    from retry_scheduler.schema import migrate as apply_missing
    from retry_scheduler.schema import script
    from retry_scheduler.settings import load_settings

    if sql:
        print(script(), end="")  # noqa: T201
        return EX_OK

    async def work() -> None:
        applied = await apply_missing(_database(load_settings(os.environ)))
        if as_json:
            _print_json({"applied": [migration.name for migration in applied]})
            return
        for migration in applied:
            print(f"applied {migration.name}")  # noqa: T201
        if not applied:
            print("the tables are up to date")  # noqa: T201

    return _run(work())


@app.command
def check(*, as_json: AsJson = False) -> int:
    """Check settings, both servers, tables and queues; change nothing. Prints a line for each.

    A line that begins with warn tells of a promise that does not hold here; it does not change the exit code.
    """
    from retry_scheduler.preflight import Finding, check_everything
    from retry_scheduler.settings import load_settings

    settings = load_settings(os.environ)
    _require_tracing(settings)

    async def work() -> int:
        findings = [Finding("settings")]
        show(findings[0])
        async for finding in check_everything(settings):
            findings.append(finding)
            show(finding)
        exit_code = max(finding.exit_code for finding in findings)
        if as_json:
            _print_json({"exit_code": exit_code, "findings": findings})
        return exit_code

    def show(finding: Finding) -> None:
        if not as_json:
            print(finding.line)  # noqa: T201

    return _run(work())


@app.command
def status(*, as_json: AsJson = False) -> int:
    """Show what waits, what is late, who runs, and how large the tables are; change nothing."""
    from retry_scheduler.settings import load_settings
    from retry_scheduler.status.figures import take_status
    from retry_scheduler.status.text import report

    settings = load_settings(os.environ)

    async def work() -> int:
        taken = await take_status(
            _database(settings),
            settings.rabbitmq_url.get_secret_value(),
            (settings.retry_queue, settings.manual_review_queue),
            name=f"{settings.service_name} status",
        )
        if as_json:
            _print_json(taken)
        else:
            print(report(taken))  # noqa: T201
        return EX_OK if taken.postgresql.up and taken.rabbitmq.up else EX_UNAVAILABLE

    return _run(work())


@app.command
def archive(
    *,
    days: Annotated[
        int | None,
        cyclopts.Parameter(
            validator=cyclopts.validators.Number(gte=1, lte=36_500), help="Instead of RETENTION_DAYS."
        ),
    ] = None,
) -> int:
    """Move attempts finished more than RETENTION_DAYS ago to retry_queue_archive, beside running instances.

    A running instance does it daily by itself. May be interrupted at any moment.
    """
    from datetime import timedelta

    from retry_scheduler.archive import archive_finished
    from retry_scheduler.settings import load_settings

    settings = load_settings(os.environ)
    days = days or settings.retention_days
    if not days:
        raise BadSettings(["RETENTION_DAYS: is 0, nothing is archived; give --days"])

    async def work() -> None:
        done = await archive_finished(_database(settings), timedelta(days=days))
        print(  # noqa: T201
            f"archived {done.rows:,} attempts finished more than {days} days ago"
            f" in {done.took.total_seconds():.1f} s; the longest statement took"
            f" {done.longest.total_seconds() * 1000:.0f} ms"
        )

    return _run(work())


@app.command
def demo(
    *,
    keep: Annotated[
        bool, cyclopts.Parameter(negative="", help="Stay up afterwards; print URLs and a command to try.")
    ] = False,
) -> int:
    """Show the whole system at work, on a private PostgreSQL and a private RabbitMQ."""
    from retry_scheduler.demo.show import run_demo

    return run_demo(keep=keep)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        return int(
            app(arguments, exit_on_error=False, print_error=True, result_action="return_value") or EX_OK
        )
    except cyclopts.CycloptsError:
        return EX_USAGE
    except BadSettings as error:
        for problem in error.problems:
            _say(f"bad setting: {problem}")
        return EX_CONFIG
    except (UnusableSchema, PortTaken) as error:
        _say(str(error))
        return EX_CONFIG
    except Unavailable as error:
        _say(str(error))
        return EX_UNAVAILABLE
    except KeyboardInterrupt:
        return EX_INTERRUPTED
    except (Exception, BaseExceptionGroup) as error:
        _report_bug(error)
        return EX_SOFTWARE


def _report_bug(error: BaseException) -> None:
    """Tell in one line of what nobody has foreseen: in the log of `run`, on standard error otherwise.

    There, standard output has the command's answer, which a script may be reading.
    """
    import structlog

    from retry_scheduler.observability import events
    from retry_scheduler.observability.logs import flush_logs, set_up_logs

    if not structlog.is_configured():
        errors = FileIO(sys.stderr.fileno(), "w", closefd=False)
        set_up_logs("CRITICAL", service="retry-scheduler", stream=errors)
    structlog.get_logger().critical(events.SERVICE_FAILED, exc_info=error)
    flush_logs()


def _require_tracing(settings: "Settings") -> bool:
    """Return whether a collector is named. Raises BadSettings if the extra that it takes is missing."""
    if settings.otel_exporter_otlp_endpoint is None:
        return False
    try:
        import retry_scheduler.observability.tracing  # noqa: F401
    except ImportError as missing:
        raise BadSettings(
            (
                f"OTEL_EXPORTER_OTLP_ENDPOINT: tracing is not installed ({missing.name} is missing): "
                "pip install 'retry-scheduler[tracing]', or leave it unset",
            )
        ) from missing
    return True


def _start_tracing(settings: "Settings") -> "Tracing | None":
    if not _require_tracing(settings):
        return None
    from retry_scheduler.observability.logs import instance_name
    from retry_scheduler.observability.tracing import start_tracing

    try:
        return start_tracing(
            service_name=settings.service_name,
            instance=instance_name(),
            retry_queue=settings.retry_queue,
            manual_review_queue=settings.manual_review_queue,
        )
    except ValueError as refusal:
        raise BadSettings((f"OTEL_*: {refusal}",)) from refusal


def _database(settings: "Settings") -> "Database":
    from retry_scheduler.assembly import database_address
    from retry_scheduler.database import Database

    return Database(database_address(settings), pool_min=0, pool_max=1)


def _print_json(document: Any) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(document)).decode())  # noqa: T201


def _run(work: Coroutine[Any, Any, Any]) -> int:
    return int(uvloop.run(work) or EX_OK)


def _say(text: str) -> None:
    print(f"retry-scheduler: {text}", file=sys.stderr)  # noqa: T201
