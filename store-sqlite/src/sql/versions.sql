-- The last position of the log and the versions of some streams, in one row.
-- - binds: ?1 JSON array of stream ids
-- - returns: the position and recorded_at of the last event, and a JSON array with a string for each stream in the
--   order of ?1: the version, a blank and the id of the last event (`0 ` if there is no such stream)
-- - indexes used: events_stream_version, one seek per stream; the primary key for the head
SELECT coalesce(max(head.position), 0),
       coalesce(max(head.recorded_at), 0),
       (SELECT json_group_array(
                   coalesce((SELECT version || ' ' || event_id FROM events WHERE stream_id = wanted.value
                              ORDER BY version DESC LIMIT 1), '0 ') ORDER BY wanted.key)
          FROM json_each(?1) AS wanted)
  FROM (SELECT position, recorded_at FROM events ORDER BY position DESC LIMIT 1) AS head
