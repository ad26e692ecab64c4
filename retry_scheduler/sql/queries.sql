-- Every statement of the running service. "Now" is the database's; values are parameters.
-- Each is one autocommit statement. After a lost answer: settling and giving back may be repeated;
-- storing is repeated for what stored_intakes does not find; a lost claim is found by the next one.

-- name: store_requests
-- Store new attempts with their due times; an attempt that is stored already is left alone.
-- $1..$10 arrays of equal length: message_id, retry_count, max_retries, original_queue, error_reason,
-- delay interval, payload, traceparent, tracestate, intake_id; (message_id, retry_count) unique within.
-- Returns a row for each attempt newly stored: message_id, retry_count, next_retry_at, due_in (seconds).
WITH incoming AS (
    SELECT *
      FROM unnest($1::uuid[], $2::integer[], $3::integer[], $4::text[], $5::text[],
                  $6::interval[], $7::bytea[], $8::text[], $9::text[], $10::bigint[])
        AS request (message_id, retry_count, max_retries, original_queue, error_reason,
                    delay, payload, traceparent, tracestate, intake_id)
), stored AS (
    INSERT INTO retry_queue AS task (message_id, retry_count, max_retries, original_queue, error_reason,
                                     next_retry_at, payload_bytes, traceparent, tracestate, intake_id)
    SELECT message_id, retry_count, max_retries, original_queue, error_reason,
           clock_timestamp() + delay, octet_length(payload), traceparent, tracestate, intake_id
      FROM incoming
     ORDER BY message_id, retry_count  -- two instances that store the same attempts must not deadlock
        ON CONFLICT (message_id, retry_count) DO NOTHING
    RETURNING task.id, task.message_id, task.retry_count, task.next_retry_at
), kept AS (
    INSERT INTO retry_payload (id, payload)
    SELECT stored.id, incoming.payload
      FROM stored
      JOIN incoming USING (message_id, retry_count)
        ON CONFLICT (id) DO UPDATE SET payload = EXCLUDED.payload  -- a left-over of a restored backup
)
SELECT message_id, retry_count, next_retry_at,
       extract(epoch FROM next_retry_at - clock_timestamp())::float8 AS due_in
  FROM stored;

-- name: stored_intakes
-- Find which deliveries have been stored although the answer was lost.
-- $1 message ids uuid[]; $2 intake ids bigint[], of equal length.
-- Returns a row for each found: intake_id, retry_count, next_retry_at, due_in (seconds).
SELECT told.intake_id, task.retry_count, task.next_retry_at,
       extract(epoch FROM task.next_retry_at - clock_timestamp())::float8 AS due_in
  FROM unnest($1::uuid[], $2::bigint[]) AS told (message_id, intake_id)
  JOIN retry_queue AS task USING (message_id, intake_id);

-- name: attempt_states
-- Tell how attempts stand that a new message repeats.
-- $1, $2 arrays of equal length: message_id, retry_count.
-- Returns one row for each that is stored: message_id, retry_count, status, highest retry_count of that
-- message, age_s since it was stored, redelivered: whether the message it came from was, may_have_arrived: it
-- may be with its consumer already, although it is still pending, and may never be sent again.
SELECT told.message_id, told.retry_count, task.status,
       (SELECT max(other.retry_count) FROM retry_queue AS other WHERE other.message_id = told.message_id) AS highest,
       extract(epoch FROM clock_timestamp() - task.created_at)::float8 AS age_s,
       coalesce(task.intake_id < 0, false) AS redelivered,
       task.retry_count < task.max_retries
           AND (coalesce(task.last_error = 'overdue', false)
                OR (task.claimed_until IS NOT NULL
                    AND EXISTS (SELECT FROM retry_instance AS owner
                                 WHERE owner.id = task.claimed_by AND owner.gone_at IS NULL)))
           AS may_have_arrived
  FROM unnest($1::uuid[], $2::integer[]) AS told (message_id, retry_count)
  JOIN retry_queue AS task USING (message_id, retry_count);

-- name: store_quarantined
-- Keep malformed input. A redelivery of bytes that are kept already only counts them again.
-- $1..$7 arrays of equal length: sha256, field, reason, raw_body, raw_properties, redelivered, intake_id.
-- Returns one row for each newly kept, also if a lost answer makes this a repetition: intake_id.
WITH incoming AS (
    SELECT *
      FROM unnest($1::bytea[], $2::text[], $3::text[], $6::boolean[], $7::bigint[]) WITH ORDINALITY
        AS message (sha256, field, reason, redelivered, intake_id, place)
), kept_already AS (
    SELECT incoming.intake_id
      FROM incoming
      JOIN retry_quarantine AS kept USING (sha256, intake_id)
), seen_before AS (
    UPDATE retry_quarantine AS kept
       SET seen = kept.seen + 1
      FROM incoming
     WHERE incoming.redelivered AND kept.id = (
               SELECT min(first.id) FROM retry_quarantine AS first WHERE first.sha256 = incoming.sha256)
    RETURNING kept.sha256
), kept_now AS (
    INSERT INTO retry_quarantine (sha256, field, reason, raw_body, raw_properties, intake_id)
    -- Not through `incoming`, which would be written to a temporary file where a body is large.
    SELECT sha256, field, reason, ($4::bytea[])[place], ($5::bytea[])[place], intake_id
      FROM incoming
     WHERE intake_id NOT IN (SELECT intake_id FROM kept_already)
       AND (NOT redelivered OR sha256 NOT IN (SELECT sha256 FROM seen_before))
    RETURNING intake_id
)
SELECT intake_id FROM kept_now
UNION ALL
SELECT intake_id FROM kept_already;

-- name: claim_due
-- Lend due attempts to one instance, oldest first; the others pass over what it holds.
-- $1 limit_rows int; $2 lasts interval; $3 owner uuid; $4 limit_bytes bigint: at least one row, then
-- as many as fit; $5 floor timestamptz: nothing pending is older, see search_floor;
-- $6 bigint[] what the owner knows to hold: the rest that is lent to it was lost with an answer;
-- $7 int: larger payloads do not come along, see payload; $8 int: nothing with a larger one is lent.
-- A lease whose owner is known to be gone is void; that of an owner in the register does not run out.
-- Returns the attempts lent, in no promised order; late_s is the time since they were due;
-- payload is NULL where it is too large or an operator has deleted it; more: others may be due that exceeded a limit.
WITH due AS MATERIALIZED (  -- joined inline, the planner may lend more than the limit
    SELECT id, next_retry_at, payload_bytes
      FROM retry_queue
     WHERE status = 'pending'
       AND next_retry_at >= $5
       AND next_retry_at <= now()
       AND payload_bytes <= $8
       AND (claimed_until IS NULL
            OR (claimed_until <= now()
                AND (claimed_by IN (SELECT id FROM retry_instance WHERE gone_at IS NULL)) IS NOT TRUE)
            OR claimed_by IN (SELECT id FROM retry_instance WHERE gone_at IS NOT NULL)
            OR (claimed_by = $3 AND id <> ALL ($6::bigint[])))
     ORDER BY next_retry_at, id
     LIMIT $1
       FOR UPDATE SKIP LOCKED
), lent AS (
    SELECT id
      FROM (SELECT id, payload_bytes,
                   sum(payload_bytes::bigint) OVER (ORDER BY next_retry_at, id) AS total_bytes
              FROM due) AS line
     WHERE total_bytes <= $4 OR total_bytes = payload_bytes
)
UPDATE retry_queue AS task
   SET claimed_until = now() + $2::interval, claimed_by = $3, claims = task.claims + 1,
       claims_unsettled = task.claims_unsettled + 1
  FROM lent
  LEFT JOIN retry_payload AS body ON body.id = lent.id
 WHERE task.id = lent.id
RETURNING task.id, task.claims, task.message_id, task.original_queue, task.error_reason, task.retry_count,
          task.max_retries, task.publish_failures, task.claims_unsettled, task.traceparent, task.tracestate,
          CASE WHEN task.payload_bytes <= $7 THEN body.payload END AS payload, task.payload_bytes,
          extract(epoch FROM clock_timestamp() - task.next_retry_at)::float8 AS late_s,
          (SELECT count(*) FROM due) >= least($1, (SELECT count(*) FROM lent) + 1) AS more;

-- name: allow_more_time
-- Give the rest of this transaction more time. $1 text: a duration, such as '25s'.
SELECT set_config('statement_timeout', $1, true), set_config('idle_in_transaction_session_timeout', $1, true);

-- name: payload
-- Get one large payload. $1 id bigint.
SELECT payload FROM retry_payload WHERE id = $1;

-- name: complete
-- Settle attempts whose publication was confirmed. An owner that was overtaken changes nothing.
-- $1 ids bigint[]; $2 claims int[]; $3 statuses text[]; $4 notes text[].
-- Returns the ids settled. Repeating it after a lost answer returns them again.
-- Not "status = 'pending'": that would let the planner come in through the partial index of pending
-- rows, all of them for each row to settle, on a table that has not been analyzed yet.
WITH done AS (
    SELECT * FROM unnest($1::bigint[], $2::integer[], $3::text[], $4::text[]) AS done (id, claims, status, note)
), settled AS (
    UPDATE retry_queue AS task
       SET status = done.status, last_error = done.note, finished_at = clock_timestamp(), claimed_until = NULL
      FROM done
     WHERE task.id = done.id AND task.claims = done.claims
       AND task.status NOT IN ('retried', 'failed', 'discarded')  -- see above
    RETURNING task.id
)
SELECT id FROM settled
UNION ALL
SELECT task.id
  FROM done
  JOIN retry_queue AS task ON task.id = done.id
 WHERE task.claims = done.claims AND task.status = done.status AND task.finished_at IS NOT NULL
   AND (SELECT count(*) FROM settled) < (SELECT count(*) FROM done);  -- otherwise nothing can be found here

-- name: release
-- Give attempts back: returned, refused or unknown ones with a new due time, unpublished ones as they were.
-- $1 ids bigint[]; $2 claims int[]; $3 failures int[] to add; $4 errors text[], NULL keeps the last;
-- $5 delays interval[], NULL keeps the due time; $6 claims_unsettled int[], 0 if the outcome was known.
-- Returns id and due_in (seconds) of those given back. Repeating it after a lost answer changes nothing.
-- What is held is still overdue if it was: it lies in its queue, and may arrive there.
UPDATE retry_queue AS task
   SET claimed_by = NULL, claimed_until = NULL, claims_unsettled = given.unsettled,
       publish_failures = task.publish_failures + given.failures,
       last_error = CASE WHEN given.error = 'held' AND task.last_error = 'overdue' THEN task.last_error
                         ELSE coalesce(given.error, task.last_error) END,
       next_retry_at = coalesce(clock_timestamp() + given.delay, task.next_retry_at)
  FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::text[], $5::interval[], $6::integer[])
    AS given (id, claims, failures, error, delay, unsettled)
 WHERE task.id = given.id AND task.claims = given.claims AND task.claimed_by IS NOT NULL
   AND task.status NOT IN ('retried', 'failed', 'discarded')  -- as in complete
RETURNING task.id, extract(epoch FROM task.next_retry_at - clock_timestamp())::float8 AS due_in;

-- name: suspect
-- Change the evidence against attempts that are lent to us, and nothing else. May be repeated.
-- $1 ids bigint[]; $2 claims int[]; $3 claims_unsettled int[].
UPDATE retry_queue AS task
   SET claims_unsettled = given.unsettled
  FROM unnest($1::bigint[], $2::integer[], $3::integer[]) AS given (id, claims, unsettled)
 WHERE task.id = given.id AND task.claims = given.claims
   AND task.status NOT IN ('retried', 'failed', 'discarded');  -- as in complete

-- name: claim_quarantined
-- Lend quarantined messages that manual review has not got yet. $1 to $4 as in claim_due.
WITH due AS MATERIALIZED (
    SELECT id, next_try_at, octet_length(raw_body) AS body_bytes
      FROM retry_quarantine
     WHERE delivered_at IS NULL
       AND next_try_at <= now()
       AND (claimed_until IS NULL
            OR (claimed_until <= now()
                AND (claimed_by IN (SELECT id FROM retry_instance WHERE gone_at IS NULL)) IS NOT TRUE)
            OR claimed_by IN (SELECT id FROM retry_instance WHERE gone_at IS NOT NULL)
            OR claimed_by = $3)  -- its owner claims after settling: whatever it seems to hold was lost
     ORDER BY next_try_at, id
     LIMIT $1
       FOR UPDATE SKIP LOCKED
), lent AS (
    SELECT id
      FROM (SELECT id, body_bytes, sum(body_bytes::bigint) OVER (ORDER BY next_try_at, id) AS total_bytes
              FROM due) AS line
     WHERE total_bytes <= $4 OR total_bytes = body_bytes
)
UPDATE retry_quarantine AS kept
   SET claimed_until = now() + $2::interval, claimed_by = $3, claims = kept.claims + 1,
       claims_unsettled = kept.claims_unsettled + 1
  FROM lent
 WHERE kept.id = lent.id
RETURNING kept.id, kept.claims, kept.field, kept.reason, kept.raw_body, kept.received_at, kept.publish_failures,
          kept.claims_unsettled;

-- name: complete_quarantined
-- Note that manual review has got them. $1 ids bigint[]; $2 claims int[].
-- Returns the ids noted. Repeating it after a lost answer returns them again.
WITH done AS (
    SELECT * FROM unnest($1::bigint[], $2::integer[]) AS done (id, claims)
), noted AS (
    UPDATE retry_quarantine AS kept
       SET delivered_at = clock_timestamp(), claimed_until = NULL
      FROM done
     WHERE kept.id = done.id AND kept.claims = done.claims
       AND coalesce(kept.delivered_at, 'infinity') = 'infinity'  -- as in complete
    RETURNING kept.id
)
SELECT id FROM noted
UNION ALL
SELECT kept.id
  FROM done
  JOIN retry_quarantine AS kept ON kept.id = done.id
 WHERE kept.claims = done.claims AND kept.delivered_at IS NOT NULL
   AND (SELECT count(*) FROM noted) < (SELECT count(*) FROM done);  -- otherwise nothing can be found here

-- name: release_quarantined
-- Give back what was not confirmed. Parameters as in release. Returns the ids given back.
UPDATE retry_quarantine AS kept
   SET claimed_by = NULL, claimed_until = NULL, claims_unsettled = given.unsettled,
       publish_failures = kept.publish_failures + given.failures,
       last_error = coalesce(given.error, kept.last_error),
       next_try_at = coalesce(clock_timestamp() + given.delay, kept.next_try_at)
  FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::text[], $5::interval[], $6::integer[])
    AS given (id, claims, failures, error, delay, unsettled)
 WHERE kept.id = given.id AND kept.claims = given.claims AND kept.claimed_by IS NOT NULL
   AND coalesce(kept.delivered_at, 'infinity') = 'infinity'  -- as in complete
RETURNING kept.id;

-- name: suspect_quarantined
-- Change the evidence against quarantined messages. Parameters as in suspect.
UPDATE retry_quarantine AS kept
   SET claims_unsettled = given.unsettled
  FROM unnest($1::bigint[], $2::integer[], $3::integer[]) AS given (id, claims, unsettled)
 WHERE kept.id = given.id AND kept.claims = given.claims
   AND coalesce(kept.delivered_at, 'infinity') = 'infinity';  -- as in complete

-- name: join_instances
-- Enter one instance in the register, and forget who has been gone for long. $1 id uuid; $2 name text.
WITH forgotten AS (
    DELETE FROM retry_instance WHERE gone_at < now() - interval '1 hour'
)
INSERT INTO retry_instance (id, name) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING;

-- name: leave_instances
-- Mark this instance as gone: it holds nothing any more. $1 id uuid.
UPDATE retry_instance SET gone_at = clock_timestamp() WHERE id = $1;

-- name: bury_instances
-- Mark instances as gone whose beats have not moved since they were seen; that voids their leases.
-- $1 ids uuid[]; $2 the beats seen, bigint[]. Returns the ids and names marked.
UPDATE retry_instance AS instance
   SET gone_at = clock_timestamp()
  FROM unnest($1::uuid[], $2::bigint[]) AS seen (id, beat)
 WHERE instance.id = seen.id AND instance.beat = seen.beat AND instance.gone_at IS NULL
RETURNING instance.id, instance.name;

-- name: beat
-- Show that this instance is alive, and look at the table in the same breath.
-- $1 id uuid; $2 how far to look ahead, interval; $3 floor timestamptz, see search_floor;
-- $4 bigint[] what the instance knows to hold, as in claim_due.
-- Returns no row if the instance is not in the register or marked as gone, otherwise one row:
-- others: ids, and their beats in the same order; due_now: is something due that nobody knows to hold;
-- quarantined: does a malformed message wait for manual review;
-- coming: when the next attempts are due, in seconds from now, ascending, one for each 2 ms at most.
WITH mine AS (
    UPDATE retry_instance SET beat = beat + 1, beat_at = clock_timestamp()
     WHERE id = $1 AND gone_at IS NULL
    RETURNING id
)
SELECT others.ids, others.beats,
       EXISTS (SELECT 1 FROM retry_queue
                WHERE status = 'pending' AND next_retry_at >= $3 AND next_retry_at <= now()
                  AND (claimed_until IS NULL
                       OR (claimed_until <= now()
                           AND (claimed_by IN (SELECT id FROM retry_instance WHERE gone_at IS NULL)) IS NOT TRUE)
                       OR claimed_by IN (SELECT id FROM retry_instance WHERE gone_at IS NOT NULL)
                       OR (claimed_by = $1 AND id <> ALL ($4::bigint[])))) AS due_now,
       EXISTS (SELECT 1 FROM retry_quarantine
                WHERE delivered_at IS NULL AND next_try_at <= now()
                  AND (claimed_until IS NULL OR claimed_by = $1
                       OR (claimed_until <= now()
                           AND (claimed_by IN (SELECT id FROM retry_instance WHERE gone_at IS NULL)) IS NOT TRUE)
                       OR claimed_by IN (SELECT id FROM retry_instance WHERE gone_at IS NOT NULL))) AS quarantined,
       ARRAY (SELECT DISTINCT ceil(extract(epoch FROM soon.next_retry_at - now()) * 500)::float8 / 500
                FROM (SELECT next_retry_at FROM retry_queue
                       WHERE status = 'pending' AND next_retry_at > now() AND next_retry_at <= now() + $2::interval
                       ORDER BY next_retry_at LIMIT 20000) AS soon
               ORDER BY 1) AS coming
  FROM mine,
       (SELECT coalesce(array_agg(id ORDER BY id), '{}') AS ids, coalesce(array_agg(beat ORDER BY id), '{}') AS beats
          FROM retry_instance WHERE id <> $1 AND gone_at IS NULL) AS others;

-- name: search_floor
-- Tell below which due time nothing can be pending, so that claiming need not wade through the index
-- entries of settled rows: vacuum may not remove them while any old transaction is open.
-- Ten seconds are taken off, twice a statement's timeout, for what is being stored right now.
-- $1 timestamptz: where to begin, a floor found before.
SELECT least(min(next_retry_at), clock_timestamp()) - interval '10 s' AS floor
  FROM retry_queue
 WHERE status = 'pending' AND next_retry_at >= $1;

-- name: queue_figures
-- Count what waits, up to a million: a longer count would not be done before the next one is due.
-- Returns one row: depth; oldest_due_s, 0 if nothing is due.
SELECT (SELECT count(*) FROM (SELECT 1 FROM retry_queue WHERE status = 'pending' LIMIT 1000000) AS counted) AS depth,
       coalesce(greatest(extract(epoch FROM clock_timestamp() - (
           SELECT next_retry_at FROM retry_queue WHERE status = 'pending' ORDER BY next_retry_at LIMIT 1
       )), 0), 0)::float8 AS oldest_due_s;

-- name: server_state
-- Can this server take our writes, and may our role do its work? SELECT 1 would also succeed on a standby.
-- Returns one row: writable; lacking: tables and rights that are missing, in words.
SELECT NOT pg_is_in_recovery() AND current_setting('transaction_read_only') = 'off' AS writable,
       ARRAY (SELECT DISTINCT CASE WHEN to_regclass(needed.name) IS NULL THEN 'table ' || needed.name
                                   ELSE needed.privilege || ' on ' || needed.name END
                FROM (VALUES ('retry_queue', 'SELECT'), ('retry_queue', 'INSERT'), ('retry_queue', 'UPDATE'),
                             ('retry_payload', 'SELECT'), ('retry_payload', 'INSERT'), ('retry_payload', 'UPDATE'),
                             ('retry_quarantine', 'SELECT'), ('retry_quarantine', 'INSERT'),
                             ('retry_quarantine', 'UPDATE'),
                             ('retry_instance', 'SELECT'), ('retry_instance', 'INSERT'),
                             ('retry_instance', 'UPDATE'), ('retry_instance', 'DELETE'))
                  AS needed (name, privilege)
               -- The function is NULL for a table that does not exist.
               WHERE has_table_privilege(to_regclass(needed.name), needed.privilege) IS NOT TRUE
               ORDER BY 1) AS lacking;
