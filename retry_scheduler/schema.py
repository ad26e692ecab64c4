"""Brings the tables to the version this program needs, one numbered migration after another.

Each runs in a transaction of its own under an advisory lock, so that any number of instances may
start at once. A database that is newer than the program is used as it is: versions only add.
"""

from retry_scheduler.database import Database
from retry_scheduler.errors import UnusableSchema
from retry_scheduler.sql import Migration, migrations

# Any number will do, as long as every version of this program uses the same one.
MIGRATION_LOCK = 0x7265747279  # "retry"

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


async def migrate(database: Database) -> list[Migration]:
    """Apply the migrations that are missing and return them, oldest first.

    A database that is up to date is only read, so that a role without the right to create suffices.
    Raises Unavailable, or UnusableSchema if migrations are missing and the role may not create.
    """
    missing = await missing_migrations(database)
    applied: list[Migration] = []
    if not missing:
        return applied
    async with database.session() as connection:
        if not await connection.fetchval(_MAY_CREATE):
            names = ", ".join(migration.name for migration in missing)
            raise UnusableSchema(
                f"the database lacks {names} and this role may not create tables; "
                "run `retry-scheduler migrate` as a role that may"
            )
        for migration in missing:
            async with connection.transaction():
                # The statement timeout of a session is too short for building an index.
                await connection.execute("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '30s'")
                await connection.fetchval("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
                await connection.execute(_CREATE_VERSION_TABLE)
                if migration.version <= await connection.fetchval(_VERSION):
                    continue  # another instance was faster
                await connection.execute(migration.statements)
                await connection.execute(_NOTE_VERSION, migration.version, migration.name)
                applied.append(migration)
    return applied


async def missing_migrations(database: Database) -> list[Migration]:
    """Return the migrations that the database has not had yet, oldest first. Raises Unavailable."""
    async with database.session() as connection:
        version = 0
        if await connection.fetchval(_VERSION_TABLE_EXISTS):
            version = await connection.fetchval(_VERSION)
    return [migration for migration in migrations() if migration.version > version]
