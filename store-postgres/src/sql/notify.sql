-- Tells all processes that there is something new in the log.
-- binds: $1 channel, $2 who says so
-- index: none
SELECT pg_notify($1, $2)
