-- Locks the migrations of a schema until the end of the transaction, so that instances that start at the same time
-- migrate one after another.
-- - binds: $1 schema
-- - indexes used: none
SELECT pg_advisory_xact_lock(hashtextextended('annals: migrations of ' || $1, 0))
