-- Whether there is a schema with this name.
-- - binds: $1 schema
-- - indexes used: those of the system catalogue
SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)
