"""The story of the demo: invoices, and on which of them a team's consumer fails, how often and why.

Data only. It tells the consumer what to do; what comes of it is read from the servers.
"""

import json
from dataclasses import dataclass
from uuid import uuid4

# One invoice each: "." succeeds at once, a digit fails so often, "X" always fails, and "M" fails once
# and its program then asks for the retry with a malformed request.
STORY = "..X.1..2..X..3..M..1..3..1...2..1...1..2...1.."

ALWAYS = 1_000_000
FAILURES = {".": 0, "1": 1, "2": 2, "3": 3, "X": ALWAYS, "M": 1}

PLANS = {0: "succeeds", 1: "fails once", 2: "fails twice", 3: "fails 3 times"}
REASONS = {
    "1": "tax office: no answer in 30 s",
    "2": "database: deadlock detected",
    "3": "tax office: HTTP 503",
    "X": "VAT number is not valid",
    "M": "tax office: HTTP 503",
}


@dataclass(frozen=True, slots=True)
class Invoice:
    """One message. fails: how many of its deliveries the consumer fails on, ALWAYS for all of them.

    malformed: its program asks for the retry in a way that nobody can understand.
    """

    number: str
    message_id: str
    body: bytes
    fails: int = 0
    reason: str = ""
    malformed: bool = False

    @property
    def plan(self) -> str:
        """What its consumer is going to do, in two words."""
        if self.malformed:
            return "bad request"
        return PLANS.get(self.fails, "always fails")


def make_invoices() -> list[Invoice]:
    """Return the invoices of the story, with fresh ids, in the order they are sent."""
    return [_invoice(1001 + place, sign) for place, sign in enumerate(STORY)]


def _invoice(number: int, sign: str) -> Invoice:
    body = {
        "invoice": f"INV-{number}",
        "customer": f"customer {number * 7 % 100}",
        "amount_eur": number * 13 % 5000,
    }
    return Invoice(
        number=f"INV-{number}",
        message_id=str(uuid4()),
        body=json.dumps(body).encode(),
        fails=FAILURES[sign],
        reason=REASONS.get(sign, ""),
        malformed=sign == "M",
    )
