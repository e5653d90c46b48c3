-- A page of the log, without the events that a query leaves out.
-- - binds: $1 after this position, $2 up to this position, $3 categories or NULL, $4 types or NULL, $5 limit
-- - index: events_position_key
SELECT position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at
  FROM annals.events
 WHERE position > $1 AND position <= $2
   AND ($3::text[] IS NULL OR split_part(stream_id, '-', 1) = ANY ($3))
   AND ($4::text[] IS NULL OR type = ANY ($4))
 ORDER BY position
 LIMIT $5
