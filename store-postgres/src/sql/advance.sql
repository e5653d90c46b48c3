-- Advances the sequence of positions if the log has events at higher positions; see the function `advance`.
-- - binds: none
-- - indexes used: events_position_key
SELECT annals.advance()
