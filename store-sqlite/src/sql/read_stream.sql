-- Events of one stream.
-- binds: ?1 stream id, ?2 after this version, ?3 limit
-- A limit that is a plain bind would make SQLite prepare the statement again on every use.
-- index: events_stream_version
SELECT position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at
  FROM events
 WHERE stream_id = ?1 AND version > ?2
 ORDER BY version
 LIMIT ?3 + 0
