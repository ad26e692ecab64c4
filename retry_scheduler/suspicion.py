"""What a row's claims without an outcome say of it, and what follows. Pure.

    a few -> nothing: a crash leaves one behind on every row in hand
    more than ALONE_AFTER -> it travels alone: nothing else is outstanding beside it
    more than UNPUBLISHABLE_AFTER -> it goes to people
    more than WITHOUT_PAYLOAD_AFTER -> it goes to people without its payload

One channel that the broker closed over what was sent is as much evidence as ALONE_AFTER claims.
"""

ALONE_AFTER = 5
UNPUBLISHABLE_AFTER = ALONE_AFTER + 3
WITHOUT_PAYLOAD_AFTER = UNPUBLISHABLE_AFTER + 3


def travels_alone(claims_unsettled: int) -> bool:
    """Whether a row is suspected of harming what travels with it."""
    return claims_unsettled > ALONE_AFTER


def goes_to_people(claims_unsettled: int) -> bool:
    """Whether a row is given up as unpublishable."""
    return claims_unsettled > UNPUBLISHABLE_AFTER


def payload_may_go(claims_unsettled: int) -> bool:
    """Whether what people get may hold the payload."""
    return claims_unsettled <= WITHOUT_PAYLOAD_AFTER
