"""The alerts: each is proven to fire and to stay silent, the runbook's under their names, each explained."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.prometheus import PrivatePrometheus, program

PROJECT = Path(__file__).parents[1]
FOLDER = PROJECT / "deployment" / "prometheus"
RULES = FOLDER / "alerts.yml"
CASES = (FOLDER / "alerts_test.yml").read_text()
RUNBOOK = (PROJECT / "docs" / "runbook-v1.md").read_text()
MONITORING = (PROJECT / "docs" / "monitoring.md").read_text()

SEVERITIES = {"P0": "critical", "P1": "warning", "P2": "info"}

# Of the runbook's expressions, those that can never fire as they are printed.
CORRECTED = {"SchedulerLag"}


@pytest.fixture(scope="module")
def alerts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """Every alert as Prometheus has understood it, by its name."""
    folder = tmp_path_factory.mktemp("alerts") / "prometheus"
    with PrivatePrometheus(folder, rules=RULES, targets=[]) as prometheus:
        yield {rule["name"]: rule for rule in prometheus.rules()}


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        [program("promtool"), *arguments], cwd=FOLDER, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_and_the_example_of_a_configuration_are_valid() -> None:
    promtool("check", "rules", RULES)
    promtool("check", "config", FOLDER / "scrape.yml")


def test_each_alert_fires_in_its_case_and_is_silent_beside_it() -> None:
    promtool("test", "rules", FOLDER / "alerts_test.yml")


def test_each_alert_has_a_case_in_which_it_fires_with_the_labels_that_its_texts_use(
    alerts: dict[str, dict[str, Any]],
) -> None:
    fired = dict(re.findall(r'ALERTS\{alertname="(\w+)"(.*)\}\'', CASES))

    assert fired.keys() == alerts.keys()
    for name, rule in alerts.items():
        used = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        assert used <= set(re.findall(r'(\w+)="', fired[name])), f"{name} would show <no value>"


def test_each_alert_of_the_runbook_is_there_under_its_words_with_its_severity_and_expression(
    alerts: dict[str, dict[str, Any]],
) -> None:
    printed = alerts_of_the_runbook()

    assert len(printed) == 6
    for name, (severity, expression) in printed.items():
        assert alerts[name]["labels"]["severity"] == severity
        if name not in CORRECTED:
            assert squeezed(alerts[name]["query"]) == squeezed(expression)
    assert squeezed(printed["SchedulerLag"][1]) in squeezed(CASES), "the proof that it never fires is gone"


def test_each_alert_says_how_bad_it_is_what_it_means_and_where_to_read_on(
    alerts: dict[str, dict[str, Any]],
) -> None:
    assert len(alerts) > 15
    for name, rule in alerts.items():
        assert rule["labels"]["severity"] in SEVERITIES.values()
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert len(rule["annotations"]["summary"]) < 100
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def test_the_monitoring_page_explains_each_alert(alerts: dict[str, dict[str, Any]]) -> None:
    rows = re.findall(r"^\| `([A-Z]\w+)` \| (\w+) \| [^|]+ \| [^|]+ \|$", MONITORING, re.MULTILINE)

    assert sorted(rows) == sorted((name, rule["labels"]["severity"]) for name, rule in alerts.items())


def alerts_of_the_runbook() -> dict[str, tuple[str, str]]:
    """Severity and expression of each recommended alert, by its comment in one word."""
    chapter = RUNBOOK[RUNBOOK.index("### Recommended Alerts") : RUNBOOK.index("## Common Issues")]
    found = {}
    for section in re.split(r"^#### ", chapter, flags=re.MULTILINE)[1:]:
        (priority,) = re.findall(r"\((P\d)\)", section.splitlines()[0])
        for comment, expression in re.findall(r"```prometheus\n# (.+)\n(.+)\n```", section):
            words = comment.partition(" (")[0].split()
            found["".join(word[0].upper() + word[1:] for word in words)] = (SEVERITIES[priority], expression)
    return found


def squeezed(expression: str) -> str:
    """An expression without the spaces and capitals that Prometheus sets its own way."""
    return re.sub(r"\s+", "", expression).lower()
