"""What the package's source must not hold: SQL that is put together, and doors to the outside."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.service_process import PROJECT

PACKAGE = PROJECT / "retry_scheduler"

SQL = re.compile(
    r"\b(SELECT|INSERT INTO|DELETE FROM|UPDATE \w+\s+SET|CREATE (TABLE|ROLE|DATABASE|FUNCTION)"
    r"|ALTER|DROP|TRUNCATE|GRANT|REVOKE|COPY|SET LOCAL|LISTEN|NOTIFY)\b"
)

# Methods of a connection that take a statement first.
RUNS_SQL = {"fetch", "fetchrow", "fetchval", "execute", "executemany", "prepare", "cursor", "copy_from_query"}
STATEMENTS = {"query", "migration.statements"}

# No page is fetched that a message names, nothing is unpacked, nothing that was received is executed.
DOORS = {
    *(
        "urllib.request",
        "http.client",
        "httpx",
        "requests",
        "aiohttp",
        "ftplib",
        "smtplib",
        "telnetlib",
        "xmlrpc",
    ),
    *("pickle", "marshal", "shelve", "yaml", "dill", "joblib"),
    *("gzip", "zlib", "bz2", "lzma", "zipfile", "tarfile"),
    *("subprocess", "pty", "ctypes", "code", "codeop"),
}
# Sends spans to the collector that the operator names.
ALLOWED = {("retry_scheduler/observability/tracing.py", "imports requests")}
EXECUTES = {"eval", "exec", "compile", "__import__", "system", "popen"}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """Yield every module of the service. The demo starts servers of its own and asks nobody's messages."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if "demo" not in path.relative_to(PACKAGE).parts:
            yield path, ast.parse(path.read_text())


def problems_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, problem)."""
    constants = {
        target.id
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and _puts_text_together(node) and SQL.search(_constant_parts(node)):
            yield node.lineno, "SQL that is put together"
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if isinstance(node.func, ast.Attribute) and called in RUNS_SQL and node.args:
                yield from _problem_with_statement(node.args[0], constants)
            if called in EXECUTES and ast.unparse(node.func) != "re.compile":
                yield node.lineno, f"calls {called}"
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"imports {name.name}") for name in node.names if _is_door(name.name))
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{name.name}" for name in node.names)]
            yield from ((node.lineno, f"imports {name}") for name in names if _is_door(name))


def _puts_text_together(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add))
        or (isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"format", "join", "replace"})
    )


def _constant_parts(node: ast.AST) -> str:
    return " ".join(
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    )


def _problem_with_statement(statement: ast.expr, constants: set[str]) -> Iterator[tuple[int, str]]:
    if isinstance(statement, ast.Constant):
        return
    text = ast.unparse(statement.func if isinstance(statement, ast.Call) else statement)
    # Database.fetch takes the name of a statement, and only that, from repository.
    if text not in STATEMENTS | constants:
        yield (
            statement.lineno,
            f"runs {ast.unparse(statement)}, which is neither a constant nor from queries.sql",
        )


def _is_door(module: str) -> bool:
    return any(module == door or module.startswith(f"{door}.") for door in DOORS)


def test_no_statement_is_put_together_and_nothing_received_is_fetched_unpacked_or_executed() -> None:
    problems = [
        f"{path.relative_to(PROJECT)}:{line}: {problem}"
        for path, tree in sources()
        for line, problem in problems_of(tree)
        if (str(path.relative_to(PROJECT)), problem) not in ALLOWED
    ]

    assert problems == []


def test_the_search_finds_what_it_is_for() -> None:
    bad = [
        "connection.fetch(f'SELECT * FROM {table}')",
        "statement = 'DELETE FROM retry_queue WHERE id = %s' % number",
        "statement = 'UPDATE retry_queue SET ' + columns",
        "statement = 'DROP TABLE {}'.format(name)",
        "statement = ' '.join(['SELECT', column])",
        "connection.execute(text)",
        "connection.fetchval(build())",
        "import urllib.request",
        "from http import client",
        "import gzip, json",
        "from pickle import loads",
        "eval(body)",
        "import os\nos.system(queue)",
    ]
    good = [
        "_VERSION = 'SELECT 1'\nconnection.fetch(_VERSION)",
        "connection.fetch(query(name), *arguments)",
        "connection.execute('COMMIT')",
        "connection.execute(migration.statements)",
        "text = f'{server} is away'",
        "re.compile(pattern)",
        "from urllib.parse import urlsplit",
    ]

    assert [source for source in bad if not list(problems_of(ast.parse(source)))] == []
    assert [source for source in good if list(problems_of(ast.parse(source)))] == []
