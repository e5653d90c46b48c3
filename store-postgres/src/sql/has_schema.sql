-- Whether there is a schema of this name.
-- - binds: $1 schema
-- - index: those of the catalogue
SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)
