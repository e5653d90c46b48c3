-- Events of one stream.
-- - binds: $1 stream id, $2 the version after which to start, $3 limit
-- - indexes used: events_stream_version
SELECT position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at
  FROM annals.events
 WHERE stream_id = $1 AND version > $2
 ORDER BY version
 LIMIT $3
