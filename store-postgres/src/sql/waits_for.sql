-- Describes the transactions that a reader waits for.
-- - binds: $1 virtual transactions
-- - returns: the pid (0 for a prepared transaction), the age in seconds, and the name of the application (for a
--   prepared transaction, the global id)
-- - indexes used: none
SELECT DISTINCT coalesce(l.pid, 0),
       coalesce(extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared)), 0)::float8 AS age,
       coalesce(a.application_name, p.gid, '')
  FROM pg_locks AS l
  LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
  LEFT JOIN pg_locks AS x
         ON l.pid IS NULL AND x.pid IS NULL AND x.virtualtransaction = l.virtualtransaction AND x.locktype = 'transactionid'
  LEFT JOIN pg_prepared_xacts AS p ON p.transaction = x.transactionid
 WHERE l.virtualtransaction = ANY ($1) AND l.locktype = 'relation' AND l.relation = 'annals.events'::regclass
 ORDER BY age DESC
