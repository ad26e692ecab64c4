"""Brings the tables to the version this program needs, one numbered migration after another.

Each runs in a transaction of its own under an advisory lock, so that any number of instances may
start at once. A database that is newer than the program is used as it is: versions only add.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from retry_scheduler.database import READ_ONLY, SERVER, Database
from retry_scheduler.errors import StatementRefused, Unavailable, UnusableSchema
from retry_scheduler.sql import Migration, migrations, query

# Any number will do, as long as every version of this program uses the same one.
MIGRATION_LOCK = 0x7265747279  # "retry"

# A handful of short statements; longer means that the link has fallen silent.
INSPECT_WITHIN_S = 10.0
# Building an index over a large table takes minutes. A link that has fallen silent must not hold up
# the start for ever.
MIGRATE_WITHIN_S = 900.0

_VERSION_TABLE_EXISTS = "SELECT to_regclass('retry_schema_version') IS NOT NULL"
_CREATE_VERSION_TABLE = """
CREATE TABLE IF NOT EXISTS retry_schema_version (
    version    integer     PRIMARY KEY,
    name       text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)"""
_VERSION = "SELECT coalesce(max(version), 0) FROM retry_schema_version"
_NOTE_VERSION = "INSERT INTO retry_schema_version (version, name) VALUES ($1, $2)"
_MAY_CREATE = "SELECT has_schema_privilege(current_schema(), 'CREATE')"

_SCRIPT_HEAD = """\
-- The tables of retry-scheduler. Run with psql -v ON_ERROR_STOP=1, as the role that shall own them.
-- Leave out what retry_schema_version says has been applied. The role that the service logs in with needs
--   GRANT SELECT ON retry_schema_version TO ...;
--   GRANT SELECT, INSERT, UPDATE ON retry_queue, retry_payload, retry_quarantine TO ...;
--   GRANT SELECT, INSERT, UPDATE, DELETE ON retry_instance TO ...;
-- and, unless RETENTION_DAYS=0:
--   GRANT DELETE ON retry_queue, retry_payload TO ...;
--   GRANT INSERT ON retry_queue_archive TO ...;
"""
_SCRIPT_STEP = """
-- {name}

BEGIN;
SELECT pg_advisory_xact_lock({lock});
{create_version_table};

{statements}

INSERT INTO retry_schema_version (version, name) VALUES ({version}, '{name}');
COMMIT;
"""

_EXISTS_ALREADY = ("42P07", "42710", "42723")  # a table or index, another object, a function
_NO_RIGHT = "42501"


@dataclass(frozen=True, slots=True)
class SchemaState:
    """What the database has.

    version: of the newest migration applied; 0 without any. missing: migrations, oldest first.
    lacking: tables and rights, in words; only if none is missing.
    """

    version: int
    missing: Sequence[Migration]
    may_create: bool
    lacking: Sequence[str]

    @property
    def newer(self) -> bool:
        """Whether a newer version of this program has been here."""
        return self.version > max(migration.version for migration in migrations())

    @property
    def problem(self) -> str | None:
        """Why the program cannot work with it, and what to do; None if it can, or can migrate it."""
        if self.missing and not self.may_create:
            return (
                f"the database lacks {', '.join(migration.name for migration in self.missing)} and this "
                "role may not create tables; run `retry-scheduler migrate` as a role that may"
            )
        if self.lacking and not self.missing:
            return (
                f"the database lacks {', '.join(self.lacking)}, although it has been migrated; "
                "restore the tables, and grant this role its rights"
            )
        return None


async def migrate(database: Database) -> list[Migration]:
    """Apply the migrations that are missing and return them, oldest first.

    A database that is up to date is only read, so that a role without the right to create suffices.
    Raises Unavailable, or UnusableSchema if this role cannot bring the tables to what is needed.
    """
    state = await inspect(database)
    if state.problem:
        raise UnusableSchema(state.problem)
    return [migration for migration in state.missing if await _apply(database, migration)]


async def inspect(database: Database) -> SchemaState:
    """Look at the tables and change nothing.

    Raises Unavailable, also if the server takes no writes, or UnusableSchema if the role may not look.
    """
    with _refusals_explained("looking at the tables"):
        async with database.session(within_s=INSPECT_WITHIN_S) as connection:
            version = 0
            if await connection.fetchval(_VERSION_TABLE_EXISTS):
                version = await connection.fetchval(_VERSION)
            missing = [migration for migration in migrations() if migration.version > version]
            may_create = bool(await connection.fetchval(_MAY_CREATE))
            (server,) = await connection.fetch(query("server_state"))
            if not server["writable"]:
                raise Unavailable(SERVER, READ_ONLY)
    return SchemaState(version, missing, may_create, () if missing else tuple(server["lacking"]))


def script() -> str:
    """Return all migrations as one text for psql, in transactions as `migrate` would run them."""
    return _SCRIPT_HEAD + "".join(
        _SCRIPT_STEP.format(
            lock=MIGRATION_LOCK,
            create_version_table=_CREATE_VERSION_TABLE.strip(),
            name=migration.name,
            version=migration.version,
            statements=migration.statements.strip(),
        )
        for migration in migrations()
    )


async def _apply(database: Database, migration: Migration) -> bool:
    """Return whether this call applied it: another instance may have been faster."""
    with _refusals_explained(f"applying {migration.name}"):
        async with database.session(within_s=MIGRATE_WITHIN_S) as connection:
            # BEGIN and COMMIT by hand: asyncpg's transaction would wait for a silent server once more,
            # to roll back. The statement timeout of a session is too short for building an index.
            await connection.execute("BEGIN; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '30s'")
            await connection.fetchval("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
            await connection.execute(_CREATE_VERSION_TABLE)
            if migration.version <= await connection.fetchval(_VERSION):
                return False
            await connection.execute(migration.statements)
            await connection.execute(_NOTE_VERSION, migration.version, migration.name)
            await connection.execute("COMMIT")
    return True


@contextmanager
def _refusals_explained(doing: str) -> Iterator[None]:
    """Waiting does not help against a table that is in the way: say what does."""
    try:
        yield
    except StatementRefused as refusal:
        if refusal.sqlstate in _EXISTS_ALREADY:
            advice = (
                "The database holds something else of that name, perhaps another program's table: "
                "rename it, or give this program a database of its own (POSTGRES_DB)"
            )
        elif refusal.sqlstate == _NO_RIGHT:
            advice = "Grant this role the right, or run `retry-scheduler migrate` as a role that has it"
        else:
            advice = "The tables are not those of this program, or the server's version is not supported"
        raise UnusableSchema(f"{doing}: {refusal.problem}. {advice}.") from refusal
