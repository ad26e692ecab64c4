"""What the demo has seen: deliveries, rows, copies for people. All that it shows and judges comes from here.

Values only. `team` and `watch` fill them from the servers; nothing here knows what was meant to happen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from retry_scheduler.demo.invoices import Invoice


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as the team's consumer got it.

    message_id: empty if it carries none. retry_count: of x-retry-count; 0 for the first delivery.
    """

    message_id: str
    retry_count: int
    arrived_at: datetime
    succeeded: bool
    body: bytes


@dataclass(frozen=True, slots=True)
class Row:
    """One attempt in the table retry_queue. finished_at: None while it is pending."""

    message_id: str
    retry_count: int
    max_retries: int
    status: str
    created_at: datetime
    next_retry_at: datetime
    finished_at: datetime | None
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One row of retry_quarantine. message_id: None if the raw bytes tell none; delivered_at: to people."""

    id: int
    message_id: str | None
    field: str
    received_at: datetime
    delivered_at: datetime | None


@dataclass(frozen=True, slots=True)
class ReviewCopy:
    """One message on manual-review.pending."""

    message_id: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of it at one moment. sent: what the broker has confirmed. depths: messages in each queue."""

    sent: Mapping[str, Invoice]
    deliveries: Sequence[Delivery]
    rows: Sequence[Row]
    quarantined: Sequence[Quarantined]
    copies: Sequence[ReviewCopy]
    depths: Mapping[str, int] = field(default_factory=dict)

    def name_of(self, message_id: str | None) -> str:
        """Return the invoice's number, or the id of a message that is none of ours."""
        invoice = self.sent.get(message_id or "")
        return invoice.number if invoice else (message_id or "a message")[:8]

    def unfinished(self) -> set[str]:
        """Return the ids of invoices that have not come to an end: success, manual review or quarantine."""
        ended = {delivery.message_id for delivery in self.deliveries if delivery.succeeded}
        return set(self.sent) - ended - {copy.message_id for copy in self.copies}
