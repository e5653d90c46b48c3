-- The last visible event, without events beyond the last position drawn.
-- binds: none
-- gives: its position and its id; no row if the log is empty
-- index: events_position_key
SELECT position, event_id FROM annals.events WHERE position <= (SELECT annals.drawn()) ORDER BY position DESC LIMIT 1
