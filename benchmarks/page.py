"""`make bench-docs`: docs/performance.md, its pictures and README's figures, from results/latest.json.

None of these figures is typed by hand. The words are in performance.template.md and readme.template.md:
    {burst[ratios][PgQueuer]:.1f}       is a figure, formatted as Python does
    [[if soak]] ... [[else]] ... [[end]] depends on whether a scenario has been measured
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.bed import CHECKOUT
from benchmarks.contestants import Native, Service
from benchmarks.pictures import lateness, throughput
from benchmarks.report import RESULTS
from benchmarks.scenario import Figures

DOCS = CHECKOUT / "docs"
TEMPLATE = Path(__file__).with_name("performance.template.md")
README = CHECKOUT / "README.md"
README_TEMPLATE = Path(__file__).with_name("readme.template.md")
README_NEEDS = ("burst", "defaults", "steady", "backlog")

_README_FIGURES = re.compile(r"(?<=<!-- make bench-docs -->\n).*?(?=<!-- end -->)", re.DOTALL)
_CHOICE = re.compile(r"\[\[if (\w+)\]\]\n(.*?)(?:\[\[else\]\]\n(.*?))?\[\[end\]\]\n", re.DOTALL)


def main() -> int:
    """Write the files; with --check only tell whether they are up to date. Without results: nothing."""
    if not RESULTS.exists():
        return 0
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    files = documents(results["machine"], results["scenarios"])
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.name} is out of date: run `make bench-docs`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
    return 0


def documents(machine: Mapping[str, Any], measured: Mapping[str, Figures]) -> dict[Path, str]:
    """Return the files and what must stand in them."""
    page = _CHOICE.sub(
        lambda found: found[2] if found[1] in measured else (found[3] or ""), TEMPLATE.read_text("utf-8")
    )
    words = {
        "machine": machine,
        "sizing": _sizing(measured),
        "tables": _tables(measured),
        "below": _below(measured),
        **measured,
    }
    files = {DOCS / "performance.md": page.format_map(words)}
    if all(name in measured for name in README_NEEDS):
        figures = README_TEMPLATE.read_text("utf-8").format_map(words)
        files[README] = _README_FIGURES.sub(lambda _: figures, README.read_text("utf-8"))
    if "burst" in measured:
        files[DOCS / "throughput.svg"] = throughput(measured["burst"])
    if "steady" in measured:
        files[DOCS / "lateness.svg"] = lateness(measured["steady"])
    return files


def _tables(measured: Mapping[str, Figures]) -> dict[str, str]:
    tables = {}
    if burst := measured.get("burst"):
        tables["burst"] = _table(
            ("", "retries/s", "the service's rate is", "own CPU", "RabbitMQ", "PostgreSQL"),
            (
                (
                    _named(name),
                    f"{each['rate_per_s']:,.0f}",
                    "" if name == Service.name else f"{burst['ratios'][name]:.2f} of it",
                    *(f"{each[who]:.0f}" for who in ("program_us", "rabbitmq_us", "postgres_us")),
                )
                for name, each in burst["contestants"].items()
            ),
        )
    for scenario in ("steady", "fast"):
        if late := measured.get(scenario):
            tables[scenario] = _table(
                ("end to end, ms", "earliest", "p50", "p99", "latest"),
                (
                    (_named(name), *(f"{each[point]:.1f}" for point in ("min", "p50", "p99", "max")))
                    for name, each in late["end_to_end_ms"].items()
                ),
            )
    if backlog := measured.get("backlog"):
        tables["backlog"] = _table(
            ("beside", "rate", "share of the empty table's", "claim p50", "claim p99", "memory"),
            (
                (
                    each["beside"],
                    f"{each['rate_per_s']:,.0f}/s",
                    f"{each['share']:.2f}",
                    f"{each['claim_ms']['p50']:.1f} ms",
                    f"{each['claim_ms']['p99']:.1f} ms",
                    f"{each['resident_mb']:.0f} MB",
                )
                for each in backlog["sizes"]
            ),
        )
    if poison := measured.get("poison"):
        tables["poison"] = _table(
            ("among the others", "one in", "retries/s of the others", "without it", "share", "each costs"),
            (
                (
                    each["name"],
                    f"{each['one_in']:,}",
                    f"{each['rate_per_s']:,.0f}",
                    f"{each['clean_per_s']:,.0f}",
                    f"{each['share']:.2f}",
                    f"{each['each_costs_ms']:,.1f} ms",
                )
                for each in poison["poisons"]
            ),
        )
    return tables


def _below(measured: Mapping[str, Figures]) -> str:
    poison = measured.get("poison")
    if poison is None:
        return ""
    kinds = [
        f"{each['name']} ({each['share']:.2f})"
        for each in poison["poisons"]
        if each["share"] < poison["bound"]
    ]
    return f"Below the promise: {', '.join(kinds)}." if kinds else "None is below the promise."


def _sizing(measured: Mapping[str, Figures]) -> dict[str, float]:
    sizing = {}
    if burst := measured.get("burst"):
        ours = burst["contestants"][Service.name]
        all_us = sum(ours[who] for who in ("program_us", "rabbitmq_us", "postgres_us"))
        sizing["service_per_core"] = 1e6 / ours["program_us"]
        sizing["whole_per_core"] = 1e6 / all_us
        sizing["cpu_us"] = all_us
        native = burst["contestants"][Native.name]
        native_us = native["rabbitmq_us"] + native["load_us"]
        broker_us = ours["rabbitmq_us"] + ours["load_us"]
        sizing["native_bound_service"] = native_us / (broker_us + ours["postgres_us"])
        sizing["native_bound_both"] = native_us / broker_us
    if backlog := measured.get("backlog"):
        sizing["bytes_per_row"] = backlog["bytes_per_row"]
        sizing["million_rows_per_gb"] = 1e9 / backlog["bytes_per_row"] / 1e6
    if soak := measured.get("soak"):
        memory_mb = soak["resident_mb"]
        sizing["soak_growth"] = soak["grown_mb"] / memory_mb[min(1, len(memory_mb) - 1)]
    return sizing


def _table(heads: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def _named(name: str) -> str:
    return f"**{name}**" if name == Service.name else name


if __name__ == "__main__":
    sys.exit(main())
