-- The number of migrations that were applied to the schema.
-- - binds: none
-- - indexes used: none
SELECT coalesce(max(version), 0)::int FROM annals.migrations
