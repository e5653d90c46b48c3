-- Advances the sequence past the events that are beyond it; see the function.
-- binds: none
-- index: events_position_key
SELECT annals.advance()
