-- The transactions that may have drawn positions that are not visible yet. Each transaction takes this lock before it
-- draws a position, and keeps the lock until it has ended. A prepared transaction keeps its virtual transaction id
-- until the server restarts (before PostgreSQL 14.1, only until it is prepared); from then on, its id is
-- -1/<transaction id>.
-- binds: none
-- index: none
SELECT DISTINCT virtualtransaction
  FROM pg_locks
 WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
   AND relation = 'annals.events'::regclass
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
