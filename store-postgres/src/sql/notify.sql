-- Tells all processes that there is something new in the log.
-- binds: $1 channel
-- index: none
SELECT pg_notify($1, '')
