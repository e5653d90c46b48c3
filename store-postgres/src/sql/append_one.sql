-- Appends a single event. The statement does the same as `append_events`, but without arrays and with as few plan
-- nodes as possible.
-- - binds: $1 stream, $2 version, $3 event id, $4 type, $5 schema version, $6 data, $7 metadata, $8 the id of the
--   stream's previous event (NULL: any event)
-- - returns: the position and the time of recording; no row if the stream does not end with the previous version or the
--   previous event (nothing was written then)
-- - indexes used: events_stream_version, one seek; adds entries to events_position_key and events_stream_version
INSERT INTO annals.events (position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
-- The time of recording is the time of this server, or the time of the last event if that time is later. A time that is
-- a day or more in the future was written by hand, and is ignored.
SELECT drawn.position, $1, $2, $3, $4, $5, $6::text::json, $7::text::json,
       CASE WHEN drawn.last > clock_timestamp() AND drawn.last < clock_timestamp() + interval '1 day' THEN drawn.last
            ELSE clock_timestamp() END
  FROM (SELECT d.position,
               (SELECT e.recorded_at FROM annals.events AS e WHERE e.position < d.position
                 ORDER BY e.position DESC LIMIT 1) AS last
          -- A position is drawn only if the condition holds.
          FROM (SELECT nextval('annals.events_position') AS position
                 WHERE pg_advisory_xact_lock_shared(
                           'annals.events'::regclass::oid::int, (hashtextextended($1::text, 0) & 1023)::int) IS NOT NULL
                   AND $2::bigint = 1 + coalesce((SELECT CASE WHEN e.event_id = coalesce($8::uuid, e.event_id) THEN e.version
                                                              ELSE -1 END
                                                    FROM annals.events AS e WHERE e.stream_id = $1
                                                   ORDER BY e.version DESC LIMIT 1), 0)
                OFFSET 0) AS d
        OFFSET 0) AS drawn
RETURNING position, recorded_at
