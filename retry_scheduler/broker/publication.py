"""One message on its way out."""

# The header by which a returned message is recognised; unique among those outstanding.
RETRY_ID = "x-retry-id"


class Publication:
    """One message for the default exchange.

    properties: encoded; they must hold `key` as x-retry-id. claim: under which lease of its row it is sent.
    """

    __slots__ = ("body", "claim", "key", "properties", "queue")

    def __init__(self, queue: str, *, key: str, properties: bytes, body: bytes, claim: int = 0) -> None:
        self.queue = queue
        self.key = key
        self.claim = claim
        self.properties = properties
        self.body = body
