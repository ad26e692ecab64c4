"""The log: one JSON object a line on standard output, one fixed sentence for each event.

The sentences are in `events`. No payload and no secret is ever handed to a logger.

How lines reach their reader, and what happens if it stops reading, is in `line_writer`.
"""

import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from datetime import UTC, datetime
from io import FileIO, RawIOBase
from typing import Any

import msgspec
import structlog

from retry_scheduler.observability import events
from retry_scheduler.observability.line_writer import LineWriter

# A stranger's text must not make a line that no collector takes: 16 KiB is a common limit, and
# escaping may make each character six bytes. What is still too long then is cut further.
_MAX_TEXT = 1024
_MAX_TRACEBACK = 8 * 1024
_MAX_ITEMS = 20
MAX_LINE_BYTES = 16 * 1024
_SHORTER = (512, 64)

# Control characters of the second kind, Unicode's line and paragraph ends, marks of direction.
_DECEPTIVE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


_writer: LineWriter | None = None
_info_renderer: "_Renderer | None" = None  # None if INFO is not logged


def set_up_logs(level: str, *, service: str, stream: RawIOBase | None = None) -> None:
    """Send structlog's and the standard library's events to `stream` as JSON lines.

    level: least severe level that is logged. stream: standard output unless given. Libraries are
    heard from WARNING on, unless level is DEBUG.
    """
    global _writer, _info_renderer  # noqa: PLW0603  one process has one standard output
    render_notice = _Renderer(service)

    def notice(lines: int) -> bytes:
        return render_notice.lines(events.LINES_DROPPED, "WARNING", _now(), ({"lines": lines},))[0]

    # Python's own buffer would be flushed at exit, and turn a full disk into an exit code.
    _writer = writer = LineWriter(stream or FileIO(sys.stdout.fileno(), "w", closefd=False), notice)
    _info_renderer = _Renderer(service) if getattr(logging, level) <= logging.INFO else None
    shared = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, _Renderer(service)],  # type: ignore[list-item]  # returns bytes for the writer
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level)),
        logger_factory=lambda *_: _LineLogger(writer),
        cache_logger_on_first_use=False,
    )
    handler = _StandardHandler(writer, _Renderer(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if level == "DEBUG" else max(logging.WARNING, getattr(logging, level)))
    # Both drivers report a server that is away with a traceback at each try. We do so in one line.
    for driver in ("pika", "asyncpg"):
        logging.getLogger(driver).setLevel(logging.DEBUG if level == "DEBUG" else logging.CRITICAL)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)


def flush_logs() -> None:
    """Wait a moment until what was logged is written: the last thing a process does."""
    if _writer is not None:
        _writer.flush()


def lines_dropped() -> int:
    """Return how many lines of the log have been lost since the start."""
    return _writer.dropped if _writer is not None else 0


def info_lines(event: str, entries: Iterable[dict[str, Any]]) -> None:
    """Log `event` at INFO once for each of `entries`, its fields; the lines of a batch share their time.

    The same lines as structlog's, for the two events that every retry has, at a third of the cost.
    """
    if _writer is None or _info_renderer is None:
        return
    _writer.write(*_info_renderer.lines(event, "INFO", _now(), entries))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class _LineLogger:
    """What structlog calls at the end of its chain."""

    def __init__(self, writer: LineWriter) -> None:
        self._write = writer.write

    def msg(self, line: bytes) -> None:
        self._write(line)

    debug = info = warning = error = critical = exception = log = msg


class _Renderer:
    """Turns an event into one line of JSON that no message text can break."""

    def __init__(self, service: str) -> None:
        self._encode = msgspec.json.Encoder().encode
        self._service = service

    def __call__(self, _: Any, __: str, event: MutableMapping[str, Any]) -> bytes:
        timestamp, level, message = event.pop("timestamp"), event.pop("level").upper(), event.pop("event")
        return self.lines(message, level, timestamp, (event,))[0]

    def lines(
        self, message: str, level: str, timestamp: str, entries: Iterable[Mapping[str, Any]]
    ) -> list[bytes]:
        """Return a line for each of `entries`, the fields of one event."""
        common = {
            "timestamp": timestamp,
            "level": level,
            "message": _bounded(message, _MAX_TEXT),
            "service": self._service,
        }
        start = self._encoded(common)[:-1]
        lines = []
        for fields in entries:
            line = self._line(start, fields, _MAX_TEXT, _MAX_TRACEBACK)
            for most in _SHORTER:
                if len(line) <= MAX_LINE_BYTES:
                    break
                line = self._line(start, fields, most, most)
            lines.append(line)
        return lines

    def _line(self, start: bytes, fields: Mapping[str, Any], most: int, most_of_traceback: int) -> bytes:
        if not fields:
            return start + b"}"
        bounded = {
            name: _bounded(value, most_of_traceback if name == "exception" else most)
            for name, value in fields.items()
        }
        return start + b"," + self._encoded(bounded)[1:]

    def _encoded(self, fields: dict[str, Any]) -> bytes:
        try:
            return _harmless(self._encode(fields))
        except UnicodeEncodeError:  # half an emoji, cut off by somebody's program
            return _harmless(self._encode({name: _encodable(value) for name, value in fields.items()}))


class _StandardHandler(logging.Handler):
    """Takes what libraries log through the standard library."""

    def __init__(self, writer: LineWriter, render: _Renderer) -> None:
        super().__init__()
        self._writer = writer
        self._render = render
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event: dict[str, Any] = {
                "event": record.getMessage(),
                "level": record.levelname,
                "logger": record.name,
            }
            if record.exc_info:
                event["exception"] = self._formatter.formatException(record.exc_info)
            stamped = structlog.processors.TimeStamper(fmt="iso", utc=True)(None, "", event)
            self._writer.write(self._render(None, "", dict(stamped)))
        except Exception:
            self.handleError(record)


def _bounded(value: Any, most: int) -> Any:
    """Return numbers as they are, lists item by item, and of anything else at most `most` characters.

    What was cut says so at its end.
    """
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, list | tuple):
        shown = [_bounded(item, most) for item in value[:_MAX_ITEMS]]
        return shown if len(value) <= _MAX_ITEMS else [*shown, f"... {len(value) - _MAX_ITEMS} more"]
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= most else text[:most] + "..."


def _harmless(line: bytes) -> bytes:
    """Escape what JSON allows and a reader may take for a line's end, a command, or a change of direction."""
    if line.isascii():
        return line.replace(b"\x7f", b"\\u007f")
    return _DECEPTIVE.sub(lambda match: f"\\u{ord(match[0]):04x}", line.decode()).encode()


def _encodable(value: Any) -> Any:
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def instance_name(environment: Mapping[str, str] | None = None) -> str:
    """Return a name that tells this process from others: host and process id."""
    host = (environment or os.environ).get("HOSTNAME") or os.uname().nodename
    return f"{host}:{os.getpid()}"
