-- Streams in byte order of their names, each with its version and position, and the times of its first and last event.
-- - binds: ?1 the name after which to start, ?2 limit
-- - indexes used: events_stream_version, three seeks per stream
WITH RECURSIVE names (stream_id) AS (
    SELECT min(stream_id) FROM events WHERE stream_id > ?1
     UNION ALL
    SELECT (SELECT min(stream_id) FROM events WHERE stream_id > names.stream_id)
      FROM names
     WHERE names.stream_id IS NOT NULL
     LIMIT ?2 + 0
)
SELECT names.stream_id, last.version, last.position,
       (SELECT recorded_at FROM events WHERE stream_id = names.stream_id ORDER BY version LIMIT 1),
       last.recorded_at
  FROM names
  JOIN events AS last
    ON last.stream_id = names.stream_id
   AND last.version = (SELECT max(version) FROM events WHERE stream_id = names.stream_id)
 ORDER BY names.stream_id
