"""What a trial prints, and what it leaves behind for whoever must find out."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from chaos.checker import explain
from chaos.duplicates import publications
from chaos.finding import Finding
from chaos.history import History


def summary(findings: Sequence[Finding], history: History, seed: int) -> str:
    """Return one line for each invariant, and one in the words of Jepsen's total queue."""
    figures = {finding.invariant: finding.figures for finding in findings}
    duplicated = sum(
        max(publications(arrivals) - 1, 0)
        for arrivals in (*history.deliveries_by_id.values(), *history.reviews_by_id.values())
    )
    total = (
        f"lost {figures['I1']['lost']}, unexpected {figures['I2']['unexpected']}, "
        f"duplicated {duplicated}, recovered {figures['I5']['recovered']}"
    )
    return "\n".join([*(finding.line for finding in findings), f"seed {seed}: {total}"])


def details(findings: Sequence[Finding], history: History) -> str:
    """Return the first violations of each invariant, with the history of what they are about."""
    return "\n".join(line for finding in findings for line in explain(finding, history))


def keep(folder: Path, seed: int) -> Path:
    """Copy a trial's logs and its ending to where they outlast it, and return the folder."""
    kept = Path(tempfile.mkdtemp(prefix=f"chaos-seed-{seed}-"))
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    return kept
