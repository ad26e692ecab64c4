-- Statements beside the running work: archiving, and what `status`, `check` and a paused service ask.
-- "Now" is the database's; values are parameters. Each is one autocommit statement and may be repeated.

-- name: archive_finished
-- Move attempts that were finished long ago into the archive, lowest id first. Their bodies go with them.
-- $1 after_id bigint; $2 look_rows int: how many rows to look at; $3 retention interval;
-- $4 limit_bytes bigint: at least one row moves, then as many as have so many bytes of body.
-- A row that somebody holds is passed over. A row that an operator finished by hand, without finished_at,
-- counts from its creation.
-- Returns one row: moved; last_id: after it goes on the next call; done: whatever comes then is younger.
WITH looked AS MATERIALIZED (
    SELECT id, created_at FROM retry_queue WHERE id > $1 ORDER BY id LIMIT $2
), finished AS MATERIALIZED (
    SELECT id, payload_bytes
      FROM retry_queue
     WHERE id = ANY (ARRAY (SELECT id FROM looked))
       AND status IN ('retried', 'failed', 'discarded')
       AND coalesce(finished_at, created_at) < now() - $3::interval
       FOR UPDATE SKIP LOCKED
), line AS MATERIALIZED (
    SELECT id, total_bytes <= $4 OR total_bytes = payload_bytes AS fits
      FROM (SELECT id, payload_bytes, sum(payload_bytes::bigint) OVER (ORDER BY id) AS total_bytes
              FROM finished) AS summed
), moved AS (
    DELETE FROM retry_queue  -- a trigger deletes the bodies
     WHERE id = ANY (ARRAY (SELECT id FROM line WHERE fits))
       AND status IN ('retried', 'failed', 'discarded')
    RETURNING *
), kept AS (
    -- All columns, whichever a later version has added: an older program must not lose their values.
    INSERT INTO retry_queue_archive SELECT * FROM moved
)
SELECT (SELECT count(*) FROM moved) AS moved,
       coalesce((SELECT min(id) - 1 FROM line WHERE NOT fits), (SELECT max(id) FROM looked)) AS last_id,
       coalesce((SELECT bool_and(created_at >= now() - $3::interval) FROM looked), true) AS done;

-- name: due_figures
-- Count what waits, and what would be sent at once. $1 limit int: neither is counted any further.
-- Returns one row: pending; due; oldest_due_at and oldest_due_s, NULL if nothing is due.
SELECT (SELECT count(*)
          FROM (SELECT 1 FROM retry_queue WHERE status = 'pending' LIMIT $1) AS counted) AS pending,
       (SELECT count(*)
          FROM (SELECT 1 FROM retry_queue
                 WHERE status = 'pending' AND next_retry_at <= now() LIMIT $1) AS counted) AS due,
       oldest.next_retry_at AS oldest_due_at,
       extract(epoch FROM now() - oldest.next_retry_at)::float8 AS oldest_due_s
  FROM (SELECT 1) AS always
  LEFT JOIN (SELECT next_retry_at FROM retry_queue
              WHERE status = 'pending' AND next_retry_at <= now()
              ORDER BY next_retry_at LIMIT 1) AS oldest ON true;

-- name: attempt_groups
-- Count attempts by queue and status, on some of the table's pages. $1 percent real: 100 counts every row;
-- $2 limit int. Returns a row for each group found, the largest ones: original_queue, status, attempts.
SELECT original_queue, status, count(*) AS attempts
  FROM retry_queue TABLESAMPLE SYSTEM ($1)
 GROUP BY original_queue, status
 ORDER BY attempts DESC, original_queue, status
 LIMIT $2;

-- name: recent_lateness
-- How late the attempts were settled that were executed lately, among the newest ones of the table.
-- $1 newest int: how many to look at; $2 lately interval.
-- Returns one row: executed; p50_s, p99_s, max_s: seconds after the due time, NULL if there were none.
SELECT count(*) AS executed,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY late_s) AS p50_s,
       percentile_cont(0.99) WITHIN GROUP (ORDER BY late_s) AS p99_s,
       max(late_s) AS max_s
  FROM (SELECT extract(epoch FROM finished_at - next_retry_at)::float8 AS late_s
          FROM (SELECT status, finished_at, next_retry_at FROM retry_queue ORDER BY id DESC LIMIT $1) AS newest
         WHERE status = 'retried' AND finished_at > now() - $2::interval) AS lately;

-- name: review_figures
-- What people have, or will get. $1 limit int: nothing is counted any further.
-- Returns one row: quarantined, quarantine_waiting (not in manual review yet), archived (an estimate),
-- schema_version.
SELECT (SELECT count(*) FROM (SELECT 1 FROM retry_quarantine LIMIT $1) AS counted) AS quarantined,
       (SELECT count(*) FROM (SELECT 1 FROM retry_quarantine
                               WHERE delivered_at IS NULL LIMIT $1) AS counted) AS quarantine_waiting,
       coalesce((SELECT greatest(n_live_tup, 0) FROM pg_stat_user_tables
                  WHERE relid = to_regclass('retry_queue_archive')), 0) AS archived,
       (SELECT max(version) FROM retry_schema_version) AS schema_version;

-- name: instance_figures
-- Who is in the register and not marked as gone, oldest first: name, started_at, silent_s (since its last beat).
SELECT name, started_at, extract(epoch FROM clock_timestamp() - beat_at)::float8 AS silent_s
  FROM retry_instance
 WHERE gone_at IS NULL
 ORDER BY started_at, name;

-- name: table_figures
-- Our tables, by name: pages of the table itself; rows and dead_rows as the statistics estimate them;
-- total_bytes with indexes and bodies; index_bytes; vacuumed_at, NULL if never.
SELECT class.relname AS name,
       pg_relation_size(class.oid) / current_setting('block_size')::int AS pages,
       coalesce(stat.n_live_tup, 0) AS rows,
       coalesce(stat.n_dead_tup, 0) AS dead_rows,
       pg_total_relation_size(class.oid) AS total_bytes,
       pg_indexes_size(class.oid) AS index_bytes,
       greatest(stat.last_vacuum, stat.last_autovacuum) AS vacuumed_at
  FROM unnest(ARRAY['retry_queue', 'retry_payload', 'retry_queue_archive', 'retry_quarantine']) AS ours (name)
  JOIN pg_class AS class ON class.oid = to_regclass(ours.name)
  LEFT JOIN pg_stat_user_tables AS stat ON stat.relid = class.oid
 ORDER BY class.relname;

-- name: index_figures
-- The indexes of our tables, largest first: name, bytes.
SELECT index.indexrelid::regclass::text AS name, pg_relation_size(index.indexrelid) AS bytes
  FROM unnest(ARRAY['retry_queue', 'retry_payload', 'retry_quarantine']) AS ours (name)
  JOIN pg_index AS index ON index.indrelid = to_regclass(ours.name)
 ORDER BY bytes DESC, name;

-- name: oldest_transaction
-- Who has kept VACUUM from cleaning up in this database, and for how long.
-- Returns one row: who and open_s, NULL if nobody; hidden: sessions whose transactions this role may not
-- see (pg_read_all_stats would let it); slot_age: transactions since the oldest that a replication slot needs.
WITH holding AS (
    SELECT coalesce(nullif(application_name, ''), usename) || ', process ' || pid AS who, xact_start AS since
      FROM pg_stat_activity
     WHERE datname = current_database() AND pid <> pg_backend_pid()
       AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
    UNION ALL
    SELECT 'prepared transaction ' || gid, prepared FROM pg_prepared_xacts WHERE database = current_database()
)
SELECT oldest.who, extract(epoch FROM clock_timestamp() - oldest.since)::float8 AS open_s,
       (SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND query = '<insufficient privilege>') AS hidden,
       (SELECT max(age(xmin)) FROM pg_replication_slots) AS slot_age
  FROM (SELECT 1) AS always
  LEFT JOIN (SELECT who, since FROM holding WHERE since IS NOT NULL ORDER BY since LIMIT 1) AS oldest ON true;

-- name: durability
-- What this server does so that a commit survives a crash. Returns one row of settings.
SELECT current_setting('fsync') AS fsync,
       current_setting('full_page_writes') AS full_page_writes,
       current_setting('synchronous_commit') AS synchronous_commit;

-- name: archive_rights
-- Returns one row: lacking, the rights that archiving needs and this role has not, in words.
SELECT ARRAY (SELECT needed.privilege || ' on ' || needed.name
                FROM (VALUES ('retry_queue', 'DELETE'), ('retry_payload', 'SELECT'), ('retry_payload', 'DELETE'),
                             ('retry_queue_archive', 'INSERT')) AS needed (name, privilege)
               WHERE has_table_privilege(to_regclass(needed.name), needed.privilege) IS NOT TRUE
               ORDER BY 1) AS lacking;

-- name: missing_indexes
-- Returns one row: missing, names of our indexes that are not there or not valid.
SELECT ARRAY (SELECT needed.name
                FROM unnest(ARRAY['idx_retry_next_retry', 'idx_retry_quarantine_waiting',
                                  'idx_retry_quarantine_sha256']) AS needed (name)
               WHERE NOT EXISTS (SELECT 1 FROM pg_index WHERE indexrelid = to_regclass(needed.name) AND indisvalid)
               ORDER BY 1) AS missing;
