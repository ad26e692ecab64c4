"""Finds the names in a document, kind by kind, by how they are written; not whether they exist."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tests import promql
from tests.documents import CHECKOUT, Document

_CAPITALS = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b")
_SMALL = re.compile(r"(?<![\w./:-])_?[a-z][a-z0-9]*(?:_[a-z0-9]+)+(?![\w/-]|\.\w)")
_METRIC = re.compile(
    r"(?<![\w:])[a-z]+(?:_[a-z]+)*_(?:total|seconds|depth|fds|up)(?=(?:_bucket|_sum|_count)?\b)"
)
_CAMEL = re.compile(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)+\b")
_PROGRAM = re.compile(r"(?<![\w.-])retry-scheduler((?: +[^\s|&;>#)'\"`]+)*)(?=[\s)'\"]|$)")
_MAKE = re.compile(r"(?:^|[\s;&])make ([a-z-]+)((?: [A-Z]+=\S+)*)")
_SQL = re.compile(r"(?:SELECT|INSERT|UPDATE|DELETE|REINDEX|GRANT|VACUUM) ")
_ENDING = re.compile(r"\.(?:py|sql|md|yml|yaml|json|jsonl|toml|lock|log|service)$|^[A-Z][a-z]+file$")
_FOLDERS = "|".join(path.name for path in CHECKOUT.iterdir() if path.is_dir() and path.name[0] != ".")


def typed(document: Document) -> Iterator[str]:
    """Yield what one may type: each span, and each line of a block of commands without its comment."""
    yield from document.spans
    for block in document.blocks("bash"):
        for line in block.text.splitlines():
            yield re.sub(r"(?:^|\s)#.*", "", line)


def capitals(document: Document) -> Iterator[str]:
    """Yield names like settings: in capitals, with an underscore."""
    yield from _CAPITALS.findall(document.text)


def small_names(document: Document) -> Iterator[str]:
    """Yield names like functions, columns and fields: in small letters, with an underscore."""
    yield from _SMALL.findall("\n".join(block.text for block in document.blocks("text", "json")))
    for span in document.spans:
        if not _SQL.match(span) and not span.startswith("rabbitmqctl "):
            yield from _SMALL.findall(span)


def dotted_names(document: Document) -> Iterator[str]:
    """Yield names like queues and attributes: in small letters, with a dot."""
    for span in document.spans:
        if re.fullmatch(r"[a-z_-]+(?:\.[a-z_]+)+", span) and not _ENDING.search(span):
            yield span


def metrics(document: Document) -> Iterator[str]:
    """Yield names like metrics, and what PromQL reads."""
    yield from _METRIC.findall(document.text)
    for block in document.blocks("promql"):
        yield from (re.sub(r"_(?:bucket|sum|count)$", "", name) for name in promql.metrics(block.text))


def sentences(document: Document) -> Iterator[str]:
    """Yield texts like those of the log: a word with a capital, and another one."""
    for span in document.spans:
        if re.match(r"(?:[A-Z]|[A-Z]\w*[a-z]\w*) [a-z]", span):
            yield span


def statements(document: Document) -> Iterator[str]:
    """Yield whole statements of SQL that stand in the prose."""
    for span in document.spans:
        if re.match(r"(?:SELECT|INSERT|UPDATE|DELETE)\b.* ", span) and "..." not in span:
            yield span


def headers(document: Document) -> Iterator[str]:
    """Yield names like headers of messages: x-..."""
    yield from re.findall(r"(?<![\w/.-])x-[a-z-]+\b", document.prose)


def camel_names(document: Document) -> Iterator[str]:
    """Yield names like alerts and directives: SeveralWordsInOne."""
    for span in document.spans:
        yield from _CAMEL.findall(span)


def answers(document: Document) -> Iterator[str]:
    """Yield pages, with the port where one is named: /health, :8086/health; not /home, a folder."""
    for text in typed(document):
        alone = re.fullmatch(r"(?:GET |curl )?((?::\d+)?/[a-z]+)", text)
        if alone and not Path(alone[1]).is_dir():
            yield alone[1]
        for address in re.findall(r"\bhttps?://localhost:\S+\w", text):
            yield f":{urlsplit(address).port}{urlsplit(address).path}"


def files(document: Document) -> Iterator[str]:
    """Yield paths, whole or from one of our folders on; * may stand in them."""
    for span in document.spans:
        alone = re.fullmatch(r"[\w.*-]*(?:/[\w.*-]+)*/?", span) and not span.startswith("/")
        if alone and (("/" in span) or _ENDING.search(span)):
            yield span
    for text in (document.prose, *typed(document)):
        yield from re.findall(rf"(?<![\w./-])(?:{_FOLDERS})/[\w./*-]*\w", text)


def installed_files(document: Document) -> Iterator[str]:
    """Yield paths of the installed service."""
    folders = r"/opt/eracun|/etc/eracun/(?:credentials/)?retry-scheduler"
    yield from re.findall(rf"(?<![\w$.])(?:{folders})[\w./-]*\b", document.text)


def invocations(document: Document) -> Iterator[str]:
    """Yield commands of the program, and each with each of its options: archive, archive --days."""
    for text in typed(document):
        for match in _PROGRAM.finditer(text):
            words: list[str] = match[1].split()
            if words and re.fullmatch(r"[a-z]+|--\w+", words[0]):
                yield words[0]
                yield from (f"{words[0]} {word}" for word in words[1:] if word.startswith("--"))


def options(document: Document) -> Iterator[str]:
    """Yield options that stand without the program, or with one of the tools."""
    for span in document.spans:
        yield from re.findall(r"^--[\w-]+", span)
    for text in typed(document):
        for tool in re.findall(r"(?:python -m (?:chaos|benchmarks)|ARGS=)(.*)", text):
            yield from re.findall(r"--[\w-]+", tool)


def makes(document: Document) -> Iterator[str]:
    """Yield targets of make, and what is set behind them: test, ARGS=."""
    for text in typed(document):
        for target, variables in _MAKE.findall(text):
            yield target
            yield from re.findall(r"[A-Z]+=", variables)
