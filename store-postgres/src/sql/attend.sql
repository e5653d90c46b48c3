-- Says that somebody listens, for as long as this session lasts. The numbers before are those of the gates of streams.
-- binds: none
-- index: none
SELECT pg_advisory_lock_shared('annals.events'::regclass::oid::int, 1024)
