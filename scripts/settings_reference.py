"""Writes .env.example and docs/settings.md from the settings themselves: `make settings`."""

import sys
from pathlib import Path

from pydantic import SecretStr

from retry_scheduler.settings import SECRETS, Settings

ROOT = Path(__file__).resolve().parent.parent

ENV_HEAD = """\
# Settings of retry-scheduler. Everything is optional; what is commented out shows its default.
# Written by `make settings`; docs/settings.md says the same as a table.
"""
TABLE_HEAD = """\
# Settings

Environment variables; all are optional. A wrong value stops the program with exit code 78, and every
wrong one is named at once. An empty value counts as unset. `retry-scheduler check` tells whether the
servers can be reached with them.

Secrets may come from a file instead: `POSTGRES_PASSWORD_FILE`, `RABBITMQ_URL_FILE`, read again at
`SIGHUP`. With TLS (`POSTGRES_SSL=true`, `amqps://`) the server's certificate and name are verified against
the system's authorities, or those in the file that `SSL_CERT_FILE` names; there is no way back to plain text.

Written by `make settings`.

| setting | default | what it does |
|---|---|---|
"""


def shown_default(value: object) -> str:
    """Return a default as one would write it into the environment."""
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value).lower() if isinstance(value, bool) else str(value)


def references() -> dict[Path, str]:
    """Return the files and what must stand in them."""
    env, table = [ENV_HEAD], [TABLE_HEAD]
    for field, info in Settings.model_fields.items():
        name = field.upper()
        default = shown_default(info.default)
        env.append(f"# {info.description}\n#{name}={default}\n")
        if name in SECRETS:
            env.append(f"#{name}_FILE=/run/secrets/{name.lower()}\n")
        table.append(f"| `{name}` | {f'`{default}`' if default else ''} | {info.description} |\n")
    return {ROOT / ".env.example": "\n".join(env), ROOT / "docs" / "settings.md": "".join(table)}


def main() -> int:
    """Write the files; with --check only tell whether they are up to date."""
    stale = [path for path, text in references().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.name} is out of date: run `make settings`", file=sys.stderr)
        return 1 if stale else 0
    for path, text in references().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
