"""Takes over secrets that have been rotated while the service runs.

Decides what to use and says so; who uses it is the service's business.
"""

from collections.abc import Callable

import structlog

from retry_scheduler.errors import BadSettings
from retry_scheduler.observability import events
from retry_scheduler.settings import SECRETS, Settings

log = structlog.get_logger()


def with_fresh_secrets(settings: Settings, load: Callable[[], Settings]) -> Settings:
    """Return `settings` with the secrets that `load` finds now, or unchanged if something is wrong with them.

    load: reads all settings anew, files included, and raises BadSettings. Logs which secrets have changed,
    or why none is taken over: all of them, or none.
    """
    names = [name.lower() for name in SECRETS]
    try:
        fresh = load()
        for name in names:
            if getattr(settings, name) and not getattr(fresh, name):
                # Perhaps seen between emptying the file and writing it.
                raise BadSettings((f"{name.upper()}: is empty, and was not before",))
    except BadSettings as mistake:
        log.error(events.SECRETS_KEPT, problems=mistake.problems)
        return settings
    changed = {
        name: getattr(fresh, name) for name in names if getattr(fresh, name) != getattr(settings, name)
    }
    log.info(events.SECRETS_RELOADED, changed=[name.upper() for name in changed])
    return settings.model_copy(update=changed)
