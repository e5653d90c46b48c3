-- The first event after a position, and whether the last event that was seen still exists.
-- - binds: $1 the position after which to start, $2 the position of the last event that was seen, or NULL
-- - returns: the position of the first event, or NULL; the id of the event at $2, or NULL; the server's time
-- - indexes used: events_position_key, two seeks
SELECT (SELECT min(e.position) FROM annals.events AS e WHERE e.position > $1 AND e.position <= (SELECT annals.drawn())),
       (SELECT e.event_id FROM annals.events AS e WHERE e.position = $2),
       clock_timestamp()
