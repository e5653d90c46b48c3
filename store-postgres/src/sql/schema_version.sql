-- The number of migrations that the schema has had.
-- binds: none
-- index: none
SELECT coalesce(max(version), 0)::int FROM annals.migrations
