-- The last position of the log.
-- - binds: none
-- - indexes used: the primary key
SELECT coalesce(max(position), 0) FROM events
