-- Notifies all processes of new events, unless no other process listens (see `attend`).
-- - binds: $1 channel, $2 the sender
-- - indexes used: none
SELECT pg_notify($1, $2) WHERE NOT pg_try_advisory_xact_lock('annals.events'::regclass::oid::int, 1024)
