"""The dashboard and the monitoring page, beside a real Prometheus and a service that has seen everything."""

import json
import re
import urllib.request
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from retry_scheduler.demo.ports import LOOPBACK
from tests import promql
from tests.factories import make_request, new_id
from tests.prometheus import BadQuery, PrivatePrometheus
from tests.service_process import ServiceProcess, StartService
from tests.upstream import REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

PROJECT = Path(__file__).parents[1]
RULES = PROJECT / "deployment" / "prometheus" / "alerts.yml"
DASHBOARD: dict[str, Any] = json.loads((PROJECT / "deployment" / "grafana" / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES: dict[str, dict[str, Any]] = {
    variable["name"]: variable for variable in DASHBOARD["templating"]["list"]
}
MONITORING = (PROJECT / "docs" / "monitoring.md").read_text()

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
# Grafana 10 brought this version of the format; a newer Grafana turns it into its own.
GRAFANA_10 = 38

# What Grafana puts in when somebody looks at everything.
VALUES = {"$instance": ".*", "$queue": ".*", "$__rate_interval": "1m", "$__range": "1h"}

# A counter's rate needs two scrapes, a second apart, after its first event.
SEEN_WITHIN = timedelta(seconds=20)
A_SCRAPE = timedelta(seconds=1)


def test_the_dashboard_is_what_grafana_10_can_import() -> None:
    everything = DASHBOARD["panels"]

    assert DASHBOARD["schemaVersion"] == GRAFANA_10
    assert "id" not in DASHBOARD, "the id of one Grafana means nothing to another"
    assert max(Counter(panel["id"] for panel in everything).values()) == 1
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= COLUMNS
    for one, other in combinations(everything, 2):
        assert not overlap(one["gridPos"], other["gridPos"]), f"{one['title']} lies on {other['title']}"
    assert {panel["type"] for panel in PANELS} == {"stat", "timeseries", "heatmap"}


def test_each_panel_says_what_it_shows_in_which_unit_from_the_chosen_source() -> None:
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    for variable in (VARIABLES["instance"], VARIABLES["queue"]):
        assert variable["datasource"] == DATASOURCE
    for panel in PANELS:
        assert panel["description"]
        assert panel["datasource"] == DATASOURCE
        assert unit_of(panel), panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"] == DATASOURCE
            assert '=~"$instance"' in target["expr"]


async def test_each_query_of_the_dashboard_and_the_alerts_finds_data_in_a_service_that_has_seen_everything(
    start_service: StartService, upstream: Upstream, tmp_path: Path
) -> None:
    service = await start_service(MAX_PUBLISH_FAILURES="2")
    target = f"{LOOPBACK}:{service.metrics_port}"
    with PrivatePrometheus(tmp_path / "prometheus", rules=RULES, targets=[target]) as prometheus:
        await eventually(lambda: prometheus.query("service_up"), within=SEEN_WITHIN)
        await cause_everything(service, upstream)
        exported = exports(service)

        with suppress(AssertionError):
            await eventually(lambda: not silent_queries(prometheus), within=SEEN_WITHIN, every=A_SCRAPE)
        silent = silent_queries(prometheus)
        assert not silent, "no data for\n" + "\n".join(silent)
        for variable in ("instance", "queue"):
            assert label_values(prometheus, variable), f"nothing to choose for {variable}"
        await eventually(
            lambda: prometheus.query('ALERTS{alertname="RequestsQuarantined", reason="body"}'),
            within=SEEN_WITHIN,
        )
        assert [rule for rule in prometheus.rules() if rule["health"] != "ok"] == []
        read = names_read_by(rule["query"] for rule in prometheus.rules())

    drawn = names_read_by(target["expr"] for panel in PANELS for target in panel["targets"])
    series = {name for metric in exported for name in names_of(metric, exported[metric][0])}
    assert drawn <= series
    assert read <= series | {"up"}
    assert exported == explained()
    assert {metric for metric in exported if not names_of(metric, exported[metric][0]) & drawn} == not_drawn()


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up", {"up"}),
        ('sum by (queue) (rate(a_total{queue=~"x(y)}|z"}[5m])) / 1e3 > 14.4 * 0.001', {"a_total"}),
        ("max by (job)(b)and on (job)c unless ignoring(d) e offset 5m", {"b", "c", "e"}),
        ("histogram_quantile(0.9, sum by (le) (rate(f_bucket[$__rate_interval])))", {"f_bucket"}),
        ("time() - g:h", {"g:h"}),
    ],
)
def test_the_metrics_of_a_query_are_found(expression: str, names: set[str]) -> None:
    """Guards the test above: a name that is not found is not checked."""
    assert promql.metrics(expression) == names


async def cause_everything(service: ServiceProcess, upstream: Upstream) -> None:
    """Have retries executed, returned, exhausted, quarantined, ignored, and counted by us."""
    upstream.declare("orders")
    again = new_id()
    waiting = make_request(retry_after_ms=3_600_000)
    upstream.ask(
        make_request(message_id=again),
        make_request(),
        make_request(original_queue="nowhere"),
        make_request(max_retries=0),
        waiting,
        waiting,
        b"{}",
        b"no JSON",
    )
    await eventually(lambda: service.metrics().value("retry_lateness_seconds_count") == 2)
    upstream.ask(make_request(message_id=again))
    await upstream.receive("orders", 3)
    await upstream.receive(REVIEW_QUEUE, 4)
    await eventually(lambda: service.metrics().value("retry_duplicates_total", kind="ignored") == 1)
    await eventually(lambda: service.metrics().value("retry_duplicates_total", kind="stored_as_next") == 1)


def exports(service: ServiceProcess) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric of the service, by name."""
    with urllib.request.urlopen(f"http://{LOOPBACK}:{service.metrics_port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            family.name + ("_total" if family.type == "counter" else ""): (
                family.type,
                {label for sample in family.samples for label in sample.labels} - {"le"},
            )
            for family in families
        }


def explained() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric as the monitoring page has them."""
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \|([^|]*)\| [^|]+ \|$", MONITORING, re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def not_drawn() -> set[str]:
    """The metrics that the monitoring page says are not on the dashboard."""
    (sentence,) = re.findall(r"^Not on the dashboard: (.+)\.$", MONITORING, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", sentence))


def names_of(metric: str, kind: str) -> set[str]:
    """The names under which the series of a metric are stored."""
    return {metric + part for part in ("_bucket", "_count", "_sum")} if kind == "histogram" else {metric}


def names_read_by(expressions: Iterable[str]) -> set[str]:
    return {name for expression in expressions for name in promql.metrics(expression)}


def silent_queries(prometheus: PrivatePrometheus) -> list[str]:
    """Every query of a panel, and every selector of an alert, that finds nothing, with what it belongs to."""
    asked = [
        (panel["title"], filled_in(target["expr"])) for panel in PANELS for target in panel["targets"]
    ] + [
        (rule["name"], selector.text)
        for rule in prometheus.rules()
        for selector in promql.selectors(rule["query"])
    ]
    return [f"{name}: {query}" for name, query in asked if not finds_a_number(prometheus, query)]


def finds_a_number(prometheus: PrivatePrometheus, query: str) -> bool:
    try:
        return any(series["value"][1] != "NaN" for series in prometheus.query(query))
    except BadQuery as problem:
        raise AssertionError(f"{query}: {problem}") from problem


def label_values(prometheus: PrivatePrometheus, variable: str) -> set[str]:
    """What Grafana would offer for a variable."""
    (selector, label) = re.findall(r"^label_values\((.+), (\w+)\)$", VARIABLES[variable]["query"]["query"])[0]
    found = prometheus.query(filled_in(selector))
    return {series["metric"][label] for series in found if label in series["metric"]}


def filled_in(expression: str) -> str:
    for name, value in VALUES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, f"Grafana's variable is unknown here: {expression}"
    return expression


def unit_of(panel: dict[str, Any]) -> str:
    if panel["type"] == "heatmap":
        return str(panel["options"]["yAxis"]["unit"])
    return str(panel["fieldConfig"]["defaults"]["unit"])


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(
        one[start] < other[start] + other[length] and other[start] < one[start] + one[length]
        for start, length in (("x", "w"), ("y", "h"))
    )
