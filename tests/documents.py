"""The documents as tests read them: code spans, blocks of code, chapters, tables and links."""

import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parents[1]
DOCS = CHECKOUT / "docs"

_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """One block of code. line: where its first line stands in the file."""

    line: int
    language: str
    text: str


class Document:
    """One page, or a part of one."""

    def __init__(self, path: Path, text: str | None = None) -> None:
        self.path = path
        self.text = path.read_text() if text is None else text

    def __repr__(self) -> str:
        return str(self.path.relative_to(CHECKOUT))

    @cached_property
    def all_blocks(self) -> list[Block]:
        """Every block of code, in order; lines that a backslash continues are one."""
        return [
            Block(self.text[: match.start(3)].count("\n") + 1, match[2], match[3].replace("\\\n", " "))
            for match in _BLOCK.finditer(self.text)
        ]

    def blocks(self, *languages: str) -> list[Block]:
        """The blocks in one of `languages`."""
        return [block for block in self.all_blocks if block.language in languages]

    @cached_property
    def prose(self) -> str:
        """The page without its blocks."""
        return _BLOCK.sub("", self.text)

    @cached_property
    def spans(self) -> list[str]:
        """Every piece of code inside the prose, in order."""
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose)]

    @cached_property
    def statements(self) -> list[Block]:
        """Every SQL statement of the blocks, without comments and without commands of psql."""
        return [
            Block(block.line, block.language, part.strip())
            for block in self.blocks("sql")
            for part in re.sub(r"--.*$|^ *\\.*$", "", block.text, flags=re.MULTILINE).split(";")
            if part.strip()
        ]

    @cached_property
    def links(self) -> list[tuple[str, str]]:
        """Every link to a file here: its path as written, "" for this page, and its anchor or ""."""
        found = re.findall(r"\]\(([^()\s]*)\)", self.prose)
        return [tuple(link.partition("#")[::2]) for link in found if "://" not in link]

    @cached_property
    def anchors(self) -> set[str]:
        """What a link into this page may name."""
        titles = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    def chapters(self) -> dict[str, "Document"]:
        """The parts below the titles of the second level, by title, in order."""
        parts = re.split(r"^## (.*)\n", self.text, flags=re.MULTILINE)[1:]
        return {title: Document(self.path, text) for title, text in zip(parts[::2], parts[1::2], strict=True)}

    def table(self, *header: str) -> list[list[str]]:
        """The rows of every table under `header`, cell by cell."""
        titles = r"\|".join(rf" *{re.escape(title)} *" for title in header)
        tables = re.findall(rf"^\|{titles}\|\n\|[-|]+\|\n((?:\|.*\n)*)", self.text, re.MULTILINE)
        return [
            [cell.strip() for cell in row.strip("|").split("|")]
            for table in tables
            for row in table.splitlines()
        ]


# The first runbook is kept as it was and has tests of its own; the changelog tells of the past.
PAGES = [
    Document(path)
    for path in (
        CHECKOUT / "README.md",
        CHECKOUT / "CONTRIBUTING.md",
        *sorted(path for path in DOCS.glob("*.md") if path.name != "runbook-v1.md"),
    )
]
RUNBOOK = Document(DOCS / "runbook.md")


def page(name: str) -> Document:
    """The page of docs/ with this name."""
    return Document(DOCS / name)
