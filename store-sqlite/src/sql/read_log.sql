-- A page of the log.
-- The limit is an expression (+ 0): with a plain bind, SQLite would prepare the statement again on every use.
-- - binds: ?1 the position after which to start, ?2 limit
-- - indexes used: the primary key
SELECT position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at
  FROM events
 WHERE position > ?1
 ORDER BY position
 LIMIT ?2 + 0
