"""What the log may say stands in observability/events.py: no log call has a text of its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import retry_scheduler
from retry_scheduler.observability import events
from tests.documents import RUNBOOK
from tests.vocabulary import SENTENCES

PRODUCT = Path(retry_scheduler.__file__).parent
SOURCES = {path: path.read_text() for path in sorted(PRODUCT.rglob("*.py"))}

# structlog's methods and our own for many lines at once; the first argument is the sentence.
LOG_CALLS = {"debug", "info", "warning", "error", "critical", "exception", "fatal", "msg", "info_lines"}


def log_calls(source: str) -> Iterator[tuple[str, ast.expr]]:
    """Method and sentence of every log call; more than once if the sentence depends on something."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr=method), args=[sentence, *_]) if method in LOG_CALLS:
                for expression in choices(sentence):
                    yield method, expression


def sentences(source: str) -> Iterator[ast.expr]:
    """Every expression that a log call may take its sentence from."""
    variables = set()
    for _, expression in log_calls(source):
        if isinstance(expression, ast.Name):
            variables.add(expression.id)
        else:
            yield expression
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id in variables for target in targets):
                yield from choices(node.value)


def choices(expression: ast.expr) -> Iterator[ast.expr]:
    """What an expression may turn out to be: the branches of an `if`, otherwise itself."""
    if isinstance(expression, ast.IfExp):
        yield from choices(expression.body)
        yield from choices(expression.orelse)
    else:
        yield expression


def is_named(expression: ast.expr) -> bool:
    """Whether it is a sentence's name: events.SOMETHING."""
    return (
        isinstance(expression, ast.Attribute)
        and isinstance(expression.value, ast.Name)
        and expression.value.id == "events"
        and hasattr(events, expression.attr)
    )


@pytest.mark.parametrize(
    ("source", "good"),
    [
        ("log.info(events.STARTING, a=1)", True),
        ("event = events.EXHAUSTED if a == 'b' else events.UNDELIVERABLE\nlog.warning(event)", True),
        ("logs.info_lines(events.RETRY_EXECUTED, lines)", True),
        ("log.info('Service starting')", False),
        ("log.exception(f'Failed {a}')", False),
        ("structlog.get_logger().critical('Failed: ' + a)", False),
        ("log.info(events.NO_SUCH_SENTENCE)", False),
        ("log.info(SENTENCE)\nSENTENCE = 'Said by a module of its own'", False),
        ("event = events.EXHAUSTED if a else 'Gone'\nlog.warning(event)", False),
        ("logs.info_lines('Retry executed', lines)", False),
    ],
)
def test_a_sentence_is_told_from_a_text(source: str, good: bool) -> None:
    """Guards the test below."""
    found = list(sentences(source))

    assert found
    assert all(is_named(expression) for expression in found) is good


def test_every_log_call_names_its_sentence() -> None:
    texts = [
        f"{path.relative_to(PRODUCT)}:{expression.lineno}: {ast.unparse(expression)}"
        for path, source in SOURCES.items()
        for expression in sentences(source)
        if not is_named(expression)
    ]

    assert texts == []


def test_the_runbook_tells_at_which_level_each_sentence_is_said() -> None:
    """As far as the call itself names the sentence; tests/test_logs.py sees some of the others."""
    levels: dict[str, set[str]] = {}
    for source in SOURCES.values():
        for method, expression in log_calls(source):
            if isinstance(expression, ast.Attribute):
                level = {"exception": "ERROR", "info_lines": "INFO"}.get(method, method.upper())
                levels.setdefault(getattr(events, expression.attr), set()).add(level)
    told = {
        sentence.strip("`"): set(level.split(", "))
        for sentence, level, *_ in RUNBOOK.table("sentence", "level", "means", "what to do")
    }

    assert len(levels) >= 30
    assert {sentence: told.get(sentence) for sentence in levels} == levels


def test_every_sentence_is_said_and_none_twice() -> None:
    names = {name for name in vars(events) if name.isupper()}
    said = set(re.findall(r"\bevents\.([A-Z_]+)", "\n".join(SOURCES.values())))

    assert len(names) >= 35
    assert names - said == set()
    assert len(SENTENCES) == len(names), "two have the same text"
