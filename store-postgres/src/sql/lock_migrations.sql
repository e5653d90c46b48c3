-- Makes instances that start at the same time take turns, until the end of the transaction.
-- binds: $1 schema
-- index: none
SELECT pg_advisory_xact_lock(hashtextextended('annals: migrations of ' || $1, 0))
