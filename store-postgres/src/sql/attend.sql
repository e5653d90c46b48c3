-- Registers this session as a listener for as long as the session lasts. The numbers below 1024 are the gates of
-- streams.
-- binds: none
-- index: none
SELECT pg_advisory_lock_shared('annals.events'::regclass::oid::int, 1024)
