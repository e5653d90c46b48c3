-- The last visible event. Events at positions that were not drawn from the sequence (written by hand) do not count.
-- binds: none
-- returns: its position and its id; no row if the log is empty
-- index: events_position_key
SELECT position, event_id FROM annals.events WHERE position <= (SELECT annals.drawn()) ORDER BY position DESC LIMIT 1
