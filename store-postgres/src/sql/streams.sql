-- Streams in byte order of their names, each with its version and position, and the times of its first and last event.
-- - binds: $1 the name after which to start, $2 limit
-- - indexes used: events_stream_version, three seeks per stream
WITH RECURSIVE names (stream_id, n) AS (
    (SELECT e.stream_id, 1::bigint FROM annals.events AS e WHERE e.stream_id > $1 ORDER BY e.stream_id LIMIT 1)
     UNION ALL
    SELECT next.stream_id, names.n + 1
      FROM names
     CROSS JOIN LATERAL (SELECT e.stream_id FROM annals.events AS e WHERE e.stream_id > names.stream_id
                          ORDER BY e.stream_id LIMIT 1) AS next
     WHERE names.n < $2
)
SELECT names.stream_id, last.version, last.position, first.recorded_at, last.recorded_at
  FROM names
 CROSS JOIN LATERAL (SELECT e.recorded_at FROM annals.events AS e WHERE e.stream_id = names.stream_id
                      ORDER BY e.version LIMIT 1) AS first
 CROSS JOIN LATERAL (SELECT e.version, e.position, e.recorded_at FROM annals.events AS e
                      WHERE e.stream_id = names.stream_id ORDER BY e.version DESC LIMIT 1) AS last
 ORDER BY names.stream_id
 LIMIT $2
