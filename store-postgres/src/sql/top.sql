-- The last event that is visible up to a position.
-- binds: $1 up to this position
-- index: events_position_key
SELECT coalesce(max(position), 0) FROM annals.events WHERE position <= $1
