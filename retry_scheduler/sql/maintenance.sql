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
