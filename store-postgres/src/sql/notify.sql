-- Tells all processes that there is something new in the log, unless this one is alone: nobody else is there as `attend` says.
-- binds: $1 channel, $2 who says so
-- index: none
SELECT pg_notify($1, $2) WHERE NOT pg_try_advisory_xact_lock('annals.events'::regclass::oid::int, 1024)
