"""What has a name that people use, taken from the program itself: what documents may name, and must."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from retry_scheduler.cli import app
from retry_scheduler.http_api import build_app
from retry_scheduler.observability import events
from retry_scheduler.observability.metrics import Metrics
from retry_scheduler.observability.metrics_server import PATH
from retry_scheduler.settings import SECRETS, Settings

CHECKOUT = Path(__file__).parents[1]
PRODUCT = CHECKOUT / "retry_scheduler"

SENTENCES = frozenset(
    value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)
)
SETTINGS = frozenset(
    {*(name.upper() for name in Settings.model_fields), *(f"{name}_FILE" for name in SECRETS)}
)


@cache
def metrics() -> frozenset[str]:
    """Every metric of the service, as documents name it."""
    ours = Metrics()
    ours.watch(service="", up=lambda: True, blocked=lambda: False, figures=lambda: (0, 0.0))
    return frozenset(
        family.name + ("_total" if family.type == "counter" else "") for family in ours.registry.collect()
    )


@cache
def pages() -> dict[int, frozenset[str]]:
    """The paths that are answered on each port, by the port's default."""
    routes = build_app("", {}, lambda: None, lambda: None).routes
    return {
        Settings.model_fields["http_port"].default: frozenset(route.path for route in routes),  # type: ignore[attr-defined]
        Settings.model_fields["metrics_port"].default: frozenset({PATH}),
    }


@cache
def commands() -> dict[str, frozenset[str]]:
    """The options of each command of the program."""
    return {
        name: frozenset(
            option for argument in app[name].assemble_argument_collection() for option in argument.names
        )
        for name in app
        if not name.startswith("-")
    }


@cache
def tool_options() -> frozenset[str]:
    """The options of the chaos test and the benchmarks."""
    sources = "\n".join(_text(path) for folder in ("chaos", "benchmarks") for path in _python(folder))
    return frozenset(re.findall(r'add_argument\("(--[\w-]+)"', sources))


@cache
def make_targets() -> frozenset[str]:
    """The targets that `make help` shows."""
    return frozenset(re.findall(r"^([a-z-]+):.*## ", _text(CHECKOUT / "Makefile"), re.MULTILINE))


@cache
def make_variables() -> frozenset[str]:
    """What may be set behind a target."""
    return frozenset(re.findall(r"\$\((?:if |or )?(?:\$\()?([A-Z]+)\b", _text(CHECKOUT / "Makefile")))


@cache
def alerts() -> frozenset[str]:
    """The alerts for Prometheus."""
    rules = _text(CHECKOUT / "deployment" / "prometheus" / "alerts.yml")
    return frozenset(re.findall(r"^ +- alert: (\w+)$", rules, re.MULTILINE))


@cache
def directives() -> frozenset[str]:
    """The directives of the systemd unit."""
    unit = _text(CHECKOUT / "deployment" / "eracun-retry-scheduler.service")
    return frozenset(re.findall(r"^(\w+)=", unit, re.MULTILINE))


@cache
def read_variables(folder: str = "retry_scheduler") -> frozenset[str]:
    """Every environment variable that a program reads under a fixed name; not those of the demo's servers."""
    return frozenset(
        node.args[0].value
        for tree in _trees(folder)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
        and "environ" in ast.unparse(node.func.value)
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    )


@cache
def classes() -> frozenset[str]:
    """Every class of the program."""
    return frozenset(
        node.name
        for tree in _trees("retry_scheduler")
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )


@cache
def constants() -> frozenset[str]:
    """Every constant of the program's modules."""
    return frozenset(
        target.id
        for tree in _trees("retry_scheduler")
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    )


@cache
def texts() -> frozenset[str]:
    """Every text without a space in the program: names of fields, labels, headers, attributes, queues."""
    return frozenset(
        node.value
        for tree in _trees("retry_scheduler")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value
    )


@cache
def words() -> frozenset[str]:
    """Every name in the program: of functions, variables, fields, metrics, tables, columns and statements."""
    found: set[str] = set(texts())
    for tree in _trees("retry_scheduler"):
        for node in ast.walk(tree):
            found.update(_names(node))
    sql = "\n".join(_text(path) for path in (PRODUCT / "sql").rglob("*.sql"))
    found.update(re.findall(r"-- name: (\w+)", sql))
    found.update(re.findall(r"\w+", re.sub(r"--.*", "", sql)))
    return frozenset(found)


def _names(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            yield name
        case ast.keyword(arg=str(name)):
            yield name
        case ast.Constant(value=str(text)) if re.match(r"\s*(SELECT|CREATE|INSERT)\b", text):
            yield from re.findall(r"\w+", text)


def _python(folder: str) -> list[Path]:
    return sorted((CHECKOUT / folder).rglob("*.py"))


@cache
def _trees(folder: str) -> list[ast.Module]:
    # What the demo starts is no part of the service.
    return [ast.parse(_text(path)) for path in _python(folder) if "demo" not in path.parts]


@cache
def _text(path: Path) -> str:
    return path.read_text()
