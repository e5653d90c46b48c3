-- Appends a group of commits that contain only events: does the work of the function `append` in one statement, at
-- half its cost for a single commit.
--
-- The statement first takes the gates of the streams, in the same order as that function. A gate is an advisory lock
-- that stands for the streams with the same hash. The statement takes its snapshot before the gates. That is safe,
-- because a group relies only on the versions of the streams to which it appends, and if another writer is faster, the
-- unique key of the streams rejects this one. An INSERT locks the table before it runs, so before a position is drawn.
-- binds: $1 streams, $2 their guessed versions, $3 whether they are only held (NULL: not even held); $4 the number of
--        events, $5 their ranks, $6 stream ids, $7 versions, $8 event ids, $9 types, $10 schema versions, $11 data,
--        $12 metadata; $13 the ids of the events at the guessed versions (NULL: any)
-- returns: a position for each event and the time of recording; no row if a guess was wrong, and then nothing was
--          written
-- index: events_stream_version, one seek per stream; grows events_position_key and events_stream_version
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
    -- The time of recording: the time of this server, but not before the time of the last event, unless that event is
    -- dated a day or more ahead (by hand).
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
