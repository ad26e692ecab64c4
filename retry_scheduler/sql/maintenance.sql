-- Statements beside the running work: archiving, and what `status`, `check` and a paused service ask.
-- "Now" is the database's; values are parameters. Each is one autocommit statement and may be repeated.

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
