-- A page of the log.
-- - binds: $1 after this position, $2 limit
-- - index: events_position_key
SELECT position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at
  FROM annals.events
 WHERE position > $1 AND position <= (SELECT annals.drawn())
 ORDER BY position
 LIMIT $2
