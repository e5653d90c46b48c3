-- A page of the log that contains only the events that match a query. The limit is an expression (+ 0): with a plain
-- bind, SQLite would prepare the statement again on every use.
-- - binds: ?1 the position after which to start, ?2 the last position to read, ?3 JSON array of categories or NULL, ?4
--   JSON array of types or NULL, ?5 limit
-- - indexes used: the primary key
SELECT position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at
  FROM events
 WHERE position > ?1 AND position <= ?2
   AND (?3 IS NULL OR substr(stream_id, 1, instr(stream_id, '-') - 1) IN (SELECT value FROM json_each(?3)))
   AND (?4 IS NULL OR type IN (SELECT value FROM json_each(?4)))
 ORDER BY position
 LIMIT ?5 + 0
