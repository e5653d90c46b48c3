-- The first event after a position.
-- binds: $1 after this position
-- gives: its position, or NULL; and the time of the server
-- index: events_position_key
SELECT min(position), clock_timestamp() FROM annals.events WHERE position > $1 AND position <= (SELECT annals.drawn())
