-- A page of the log.
-- - binds: $1 the position after which to start, $2 limit
-- - indexes used: events_position_key
SELECT position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at
  FROM annals.events
 WHERE position > $1 AND position <= (SELECT annals.drawn())
 ORDER BY position
 LIMIT $2
