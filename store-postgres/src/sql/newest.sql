-- The last visible event. Events at positions that were written by hand, and not drawn from the sequence, do not
-- count.
-- - binds: none
-- - returns: the position and the id of the event; no row if the log is empty
-- - indexes used: events_position_key
SELECT position, event_id FROM annals.events WHERE position <= (SELECT annals.drawn()) ORDER BY position DESC LIMIT 1
