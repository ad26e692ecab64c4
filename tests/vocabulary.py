"""What has a name that people use, taken from the program itself: what documents may name, and must."""

from retry_scheduler.observability import events

SENTENCES = frozenset(
    value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)
)
