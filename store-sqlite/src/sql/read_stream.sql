-- Events of one stream.
-- The limit is an expression (+ 0): with a plain bind, SQLite would prepare the statement again on every use.
-- - binds: ?1 stream id, ?2 the version after which to start, ?3 limit
-- - indexes used: events_stream_version
SELECT position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at
  FROM events
 WHERE stream_id = ?1 AND version > ?2
 ORDER BY version
 LIMIT ?3 + 0
