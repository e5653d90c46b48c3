-- The transactions that may have drawn positions that are not visible yet. Each such transaction locks the table of
-- events before it draws a position, and keeps the lock until it has ended. The id of a prepared transaction changes to
-- `-1/<transaction id>` when the server restarts (before PostgreSQL 14.1, already when the transaction is prepared).
-- - binds: none
-- - indexes used: none
SELECT DISTINCT virtualtransaction
  FROM pg_locks
 WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
   AND relation = 'annals.events'::regclass
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
