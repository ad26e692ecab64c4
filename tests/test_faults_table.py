"""docs/faults.md names the test of each fault: each must exist, and each row have one, or a reason."""

import re
from pathlib import Path

PROJECT = Path(__file__).parents[1]
TABLE = PROJECT / "docs" / "faults.md"

TEST = re.compile(r"`tests/(\w+\.py)::(test_\w+)`")
ROWS = re.compile(r"^\| (?!fault \||-)(.+) \|$", re.MULTILINE)


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    named = set(TEST.findall(TABLE.read_text()))
    missing = [
        f"{file}::{test}"
        for file, test in sorted(named)
        if not re.search(rf"^(async )?def {test}\(", (PROJECT / "tests" / file).read_text(), re.MULTILINE)
    ]

    assert len(named) > 60
    assert not missing


def test_every_fault_of_the_table_has_a_test_or_says_why_there_is_none() -> None:
    rows = ROWS.findall(TABLE.read_text())
    bare = [row for row in rows if not TEST.search(row) and "not provoked: " not in row]

    assert len(rows) >= 100
    assert not bare
