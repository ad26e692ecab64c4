"""What the log may say stands in observability/events.py: no log call has a text of its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import retry_scheduler
from retry_scheduler.observability import events
from tests.vocabulary import SENTENCES

PRODUCT = Path(retry_scheduler.__file__).parent
SOURCES = {path: path.read_text() for path in sorted(PRODUCT.rglob("*.py"))}

# structlog's methods and our own for many lines at once; the first argument is the sentence.
LOG_CALLS = {"debug", "info", "warning", "error", "critical", "exception", "fatal", "msg", "info_lines"}


def sentences(source: str) -> Iterator[ast.expr]:
    """Every expression that a log call may take its sentence from."""
    tree = ast.parse(source)
    variables = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
            continue
        if node.func.attr in LOG_CALLS:
            for expression in choices(node.args[0]):
                if isinstance(expression, ast.Name):
                    variables.add(expression.id)
                else:
                    yield expression
    for node in ast.walk(tree):
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


def test_every_sentence_is_said_and_none_twice() -> None:
    names = {name for name in vars(events) if name.isupper()}
    said = set(re.findall(r"\bevents\.([A-Z_]+)", "\n".join(SOURCES.values())))

    assert len(names) >= 35
    assert names - said == set()
    assert len(SENTENCES) == len(names), "two have the same text"
