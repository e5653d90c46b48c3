-- The transactions that may hold positions which are not visible yet: each draws under this lock and keeps it until it
-- has ended. A prepared transaction keeps its virtual transaction until the server restarts (since PostgreSQL 14.1;
-- before that release, only until it is prepared), and is -1/<transaction id> from then on.
-- binds: none
-- index: none
SELECT DISTINCT virtualtransaction
  FROM pg_locks
 WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
   AND relation = 'annals.events'::regclass
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
