"""Finds what a PromQL expression selects. Enough for our rules and panels; Prometheus checks the rest."""

import re
from typing import NamedTuple

_TEXT = r'"(?:[^"\\]|\\.)*"'
_MATCHERS = rf'\{{(?:[^}}"]|{_TEXT})*\}}'
_LABEL_LIST = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_RANGE = re.compile(r"\[[^\]]*\]")
# A name that no "(" follows: what one follows is a function. "++" gives nothing back, or "rat" would do.
_SELECTOR = re.compile(rf"(?<![\w.:$])([a-zA-Z_:][\w:]*+)\s*+({_MATCHERS})?+(?!\s*\()")
_WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "inf", "nan"}


class Selector(NamedTuple):
    """One vector selector: the metric's name, and the selector as written, without its range."""

    metric: str
    text: str


def selectors(expression: str) -> list[Selector]:
    """Return every selector of an expression, in its order.

    >>> selectors('sum by (job) (rate(a_total{b="c}"}[5m])) / 2e3 > 0 and on (job) d')
    [Selector(metric='a_total', text='a_total{b="c}"}'), Selector(metric='d', text='d')]
    """
    bare = _RANGE.sub("", _LABEL_LIST.sub("", expression))
    return [
        Selector(match[1], match[1] + (match[2] or ""))
        for match in _SELECTOR.finditer(bare)
        if match[1].lower() not in _WORDS
    ]


def metrics(expression: str) -> set[str]:
    """Return the names of the metrics that an expression reads."""
    return {selector.metric for selector in selectors(expression)}
