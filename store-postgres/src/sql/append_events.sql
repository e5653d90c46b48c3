-- Appends a group of commits that contain only events. This one statement does the work of the function `append`. For a
-- single commit, it costs half as much as the function.
--
-- The statement first locks the gates of the streams, in the same order as the function `append`. A gate is an advisory
-- lock for all streams with the same hash. The snapshot of the statement is older than these locks. That is safe,
-- because a group relies only on the versions of the streams to which it appends: if another writer is faster, the
-- unique key of the table rejects this statement. An INSERT locks the table before it runs, and so before it draws a
-- position.
-- - binds of streams: $1 ids, $2 guessed versions, $3 whether the group locks the stream without writing to it (NULL:
--   no lock), $13 ids of the events at the guessed versions (NULL: any event)
-- - binds of events: $4 the number of events, $5 ranks in the group, $6 stream ids, $7 versions, $8 event ids, $9
--   types, $10 schema versions, $11 data, $12 metadata
-- - returns: a position for each event and the time of recording; no row if a guess was wrong (nothing was written
--   then)
-- - indexes used: events_stream_version, one seek per stream; adds entries to events_position_key and
--   events_stream_version
WITH gates AS MATERIALIZED (
    SELECT bool_and(pg_advisory_xact_lock_shared('annals.events'::regclass::oid::int, g.gate) IS NOT NULL)
      FROM (SELECT (hashtextextended(w.stream, 0) & 1023)::int AS gate
              FROM unnest($1::text[], $3::boolean[]) AS w (stream, held)
             WHERE w.held IS NOT NULL
             ORDER BY gate
            OFFSET 0) AS g
), checked AS MATERIALIZED (
    SELECT bool_and(s.guess = s.standing) AS hold
      FROM gates,
           (SELECT w.guess, coalesce((SELECT CASE WHEN e.event_id = coalesce(w.event, e.event_id) THEN e.version ELSE -1 END
                                        FROM annals.events AS e WHERE e.stream_id = w.stream
                                       ORDER BY e.version DESC LIMIT 1), 0) AS standing
              FROM unnest($1::text[], $2::bigint[], $13::uuid[]) AS w (stream, guess, event)
            OFFSET 0) AS s
), drawn AS MATERIALIZED (
    SELECT array_agg(nextval('annals.events_position')) AS positions
      FROM checked, generate_series(1, $4::int)
     WHERE checked.hold
), recorded AS MATERIALIZED (
    -- The time of recording is the time of this server, or the time of the last event if that time is later. A time
    -- that is a day or more in the future was written by hand, and is ignored.
    SELECT CASE WHEN t.last > t.now AND t.last < t.now + interval '1 day' THEN t.last ELSE t.now END AS at
      FROM (SELECT clock_timestamp() AS now,
                   (SELECT e.recorded_at FROM annals.events AS e WHERE e.position < drawn.positions[1]
                     ORDER BY e.position DESC LIMIT 1) AS last
              FROM drawn
            OFFSET 0) AS t
)
INSERT INTO annals.events (position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
SELECT drawn.positions[w.rank], w.stream_id, w.version, w.event_id, w.type, w.schema_version, w.data::json,
       w.metadata::json, recorded.at
  FROM drawn, recorded,
       unnest($5::int[], $6::text[], $7::bigint[], $8::uuid[], $9::text[], $10::int[], $11::text[], $12::text[])
       AS w (rank, stream_id, version, event_id, type, schema_version, data, metadata)
 WHERE drawn.positions IS NOT NULL
RETURNING position, recorded_at
