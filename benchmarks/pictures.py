"""The two pictures of docs/performance.md: throughput beside the yardsticks, and lateness by share."""

import math
from collections.abc import Sequence

from benchmarks.contestants import Service
from benchmarks.scenario import Figures
from benchmarks.svg import FAINT, INK, Sheet

OURS = "#0b6e99"
OTHERS = ("#9aa5b1", "#c98b3c", "#7a5ea8", "#b54848", "#5f8f4e")
MUTED = "#616e7c"

_WIDTH = 760


def throughput(burst: Figures) -> str:
    """Draw a bar for each contestant's median, fastest first, with a dot for each round."""
    contestants = sorted(burst["contestants"].items(), key=lambda item: -float(item[1]["rate_per_s"]))
    left, right, top, row = 170, 90, 64, 40
    sheet = Sheet(_WIDTH, top + row * len(contestants) + 16, "Throughput of a burst")
    sheet.text(16, 26, "Throughput: a burst through one instance", size=16, bold=True)
    sheet.text(
        16, 46, f"{burst['requests']:,} messages, retries a second; bar: median, dots: rounds", color=MUTED
    )
    longest = max(max(rounds) for rounds in burst["rounds"].values())
    scale = (_WIDTH - left - right) / longest
    for number, (name, each) in enumerate(contestants):
        y = top + row * number
        ours = name == Service.name
        sheet.text(left - 10, y + 20, name, anchor="end", bold=ours)
        sheet.box(left, y + 4, each["rate_per_s"] * scale, 24, OURS if ours else FAINT)
        for rate in burst["rounds"][name]:
            sheet.dot(left + rate * scale, y + 16)
        end = max(each["rate_per_s"], *burst["rounds"][name]) * scale
        sheet.text(left + end + 10, y + 20, f"{each['rate_per_s']:,.0f}", bold=ours)
    return sheet.finished()


def lateness(steady: Figures) -> str:
    """Draw lateness over the share of retries that were no later, both axes logarithmic."""
    curves: dict[str, Sequence[tuple[float, float]]] = steady["distributions"]
    left, right, top, height = 70, 190, 72, 300
    sheet = Sheet(_WIDTH, top + height + 56, "Lateness by share of retries")
    sheet.text(16, 26, f"Lateness at {steady['rate_per_s']}/s, delays mixed", size=16, bold=True)
    sheet.text(16, 46, "ms after the time asked for, storing and delivery included", color=MUTED)
    values = [max(ms, 0.1) for curve in curves.values() for _, ms in curve]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    wide = _WIDTH - left - right

    def place(share: float, ms: float) -> tuple[float, float]:
        across = -math.log10(1 - share) / 3  # 0 to 99.9 %
        up = (math.log10(max(ms, 0.1)) - low) / (high - low)
        return left + across * wide, top + height - up * height

    for power in range(low, high + 1):
        y = place(0, 10**power)[1]
        sheet.line([(left, y), (left + wide, y)])
        sheet.text(left - 8, y + 4, f"{10**power:g} ms", anchor="end", color=MUTED)
    for share in (0.0, 0.5, 0.9, 0.99, 0.999):
        x = place(share, 1)[0]
        sheet.line([(x, top), (x, top + height)])
        sheet.text(x, top + height + 20, f"{share * 100:g} %", anchor="middle", color=MUTED)
    sheet.text(left + wide / 2, top + height + 42, "share of retries", anchor="middle", color=MUTED)
    colors = iter(OTHERS)
    labels = []
    for name, curve in curves.items():
        ours = name == Service.name
        color = OURS if ours else next(colors)
        points = [place(share, ms) for share, ms in curve]
        sheet.line(points, color, 3 if ours else 2)
        labels.append((points[-1][1], name, color, ours))
    lowest = top
    for y, name, color, ours in sorted(labels):
        lowest = max(int(y), lowest + 18)
        sheet.text(left + wide + 10, lowest + 4, name, bold=ours, color=color if not ours else INK)
    return sheet.finished()
