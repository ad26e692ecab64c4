"""The SQL of this package: statements by name (`queries.sql`, `maintenance.sql`) and the numbered migrations.

Reads files of the package; talks to no database.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema: `version` counts from 1, `name` is its file's name."""

    version: int
    name: str
    statements: str


@cache
def _queries() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("queries.sql", "maintenance.sql"):
        text = files(__package__).joinpath(name).read_text(encoding="utf-8")
        pieces = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
        found |= zip(pieces[1::2], pieces[2::2], strict=True)
    return found


def query(name: str) -> str:
    """Return the statement called `name`. Raises KeyError if there is none."""
    return _queries()[name]


def migrations() -> list[Migration]:
    """Return all migrations, oldest first."""
    folder = files(__package__).joinpath("migrations")
    found = [
        Migration(int(file.name.split("_")[0]), file.name, file.read_text(encoding="utf-8"))
        for file in folder.iterdir()
        if file.name.endswith(".sql")
    ]
    return sorted(found, key=lambda migration: migration.version)
