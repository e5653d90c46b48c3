-- Registers this session as a listener for as long as the session lasts. Number 1024 stands for the listeners; the
-- numbers below 1024 are the gates of streams (see `append_events`).
-- - binds: none
-- - indexes used: none
SELECT pg_advisory_lock_shared('annals.events'::regclass::oid::int, 1024)
