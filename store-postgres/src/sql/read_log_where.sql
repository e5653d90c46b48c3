-- A page of the log that contains only the events that match a query.
-- - binds: $1 the position after which to start, $2 the last position to read, $3 categories or NULL, $4 types or NULL,
--   $5 limit
-- - indexes used: events_position_key
SELECT position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at
  FROM annals.events
 WHERE position > $1 AND position <= $2
   AND ($3::text[] IS NULL OR split_part(stream_id, '-', 1) = ANY ($3))
   AND ($4::text[] IS NULL OR type = ANY ($4))
 ORDER BY position
 LIMIT $5
