-- Whether there is a schema with a table of migrations. The query does not use to_regclass(), because its cache may
-- have been filled before another instance created the schema.
-- - binds: $1 schema
-- - indexes used: those of the system catalogue
SELECT EXISTS (SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
                WHERE n.nspname = $1 AND c.relname = 'migrations')
