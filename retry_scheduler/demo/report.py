"""Says in words what the summary has counted. Texts only."""

from collections.abc import Iterator

from rich.text import Text

from retry_scheduler.demo.summary import Summary, percentile

MOST_PROBLEMS = 10


def summary_lines(summary: Summary) -> Iterator[Text]:
    """Yield the summary, line by line."""
    yield Text("Summary, counted from PostgreSQL, RabbitMQ and what the consumer got", style="bold")
    yield Text()
    yield _count("invoices sent", summary.sent)
    yield _count("succeeded at once", summary.at_once, "green")
    for retries, invoices in summary.recovered.items():
        yield _count(f"recovered after {retries} {'retry' if retries == 1 else 'retries'}", invoices, "green")
    yield _count("in manual review", summary.in_review, "magenta", "no retries left")
    yield _count(
        "quarantined", summary.quarantined, "magenta", "malformed request; a copy is in manual review"
    )
    yield _count("lost", summary.lost, "red" if summary.lost else "green")
    yield _count("duplicates", summary.duplicates, "red" if summary.duplicates else "green")
    yield _count("changed bodies", summary.changed, "red" if summary.changed else "green")
    if summary.lateness_ms:
        p50, p99 = (percentile(summary.lateness_ms, share) for share in (0.5, 0.99))
        first = summary.lateness_ms[0]
        never = f"never early (min {first:.1f} ms)" if first >= 0 else "EARLY"
        yield _count("retries that came back", len(summary.lateness_ms))
        yield Text(f"  lateness                  p50 {p50:.1f} ms, p99 {p99:.1f} ms, {never}")
    yield Text()
    if summary.problems:
        yield Text("WRONG:", style="bold red")
        yield from (Text(f"  {problem}", style="red") for problem in summary.problems[:MOST_PROBLEMS])
        if len(summary.problems) > MOST_PROBLEMS:
            yield Text(f"  and {len(summary.problems) - MOST_PROBLEMS} more", style="red")
    else:
        yield Text(
            "Right: each invoice has come to one end; tables, queues and consumer agree.",
            style="bold green",
        )


def _count(label: str, count: int, style: str = "", remark: str = "") -> Text:
    return Text.assemble(f"  {label:<26}", (f"{count:>4}", style), f"   {remark}" if remark else "")
