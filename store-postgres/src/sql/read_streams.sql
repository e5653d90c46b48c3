-- Events of several streams.
-- - binds: $1 stream ids, $2 after these versions, $3 limits
-- - returns: each event with the index of its stream in $1, starting at 1
-- - indexes used: events_stream_version, one seek per stream
SELECT e.position, e.stream_id, e.version, e.event_id, e.type, e.schema_version, e.data, e.metadata, e.recorded_at, w.n
  FROM unnest($1::text[], $2::bigint[], $3::bigint[]) WITH ORDINALITY AS w (stream, after, most, n),
       LATERAL (SELECT * FROM annals.events AS of_stream
                 WHERE of_stream.stream_id = w.stream AND of_stream.version > w.after
                 ORDER BY of_stream.version
                 LIMIT w.most) AS e
 ORDER BY w.n, e.version
