-- The other schemas whose names occur in a schema's functions. If a schema was renamed, or restored under another name,
-- the bodies of its functions still contain the old name. (Views and triggers follow a renaming automatically.)
-- - binds: $1 schema
-- - indexes used: those of the system catalogue
SELECT DISTINCT named.schema
  FROM pg_proc AS p
  JOIN pg_namespace AS n ON n.oid = p.pronamespace,
       LATERAL (SELECT trim(BOTH '"' FROM m[1]) AS schema
                  FROM regexp_matches(p.prosrc, '("?[a-z_][a-z0-9_]*"?)\.(?:events|events_position|documents|migrations)\M', 'g')
                       AS m) AS named
 WHERE n.nspname = $1 AND p.proname = ANY (ARRAY['append', 'append_checked', 'operate', 'operate_checked', 'drawn', 'advance', 'grant_access'])
   AND named.schema <> $1
 ORDER BY named.schema
