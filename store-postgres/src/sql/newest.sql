-- The last event that is visible, leaving out what stands beyond the last position drawn.
-- binds: none
-- index: events_position_key
SELECT coalesce(max(position), 0) FROM annals.events WHERE position <= (SELECT annals.drawn())
