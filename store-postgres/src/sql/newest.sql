-- The last event that is visible, leaving out what stands beyond the last position drawn.
-- binds: none
-- gives: its position and its id; nothing from an empty log
-- index: events_position_key
SELECT position, event_id FROM annals.events WHERE position <= (SELECT annals.drawn()) ORDER BY position DESC LIMIT 1
