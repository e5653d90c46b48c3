-- Finds the functions of a schema in which the name of another schema occurs, and returns definitions with the correct
-- name. Only this name changes; owner and grants are kept. The name must be in quotes, except for `annals`, which is
-- replaced as a whole word.
-- - binds: $1 schema, $2 the schema that the functions name
-- - indexes used: those of the system catalogue
SELECT replace(pg_get_functiondef(p.oid), p.prosrc,
               regexp_replace(replace(p.prosrc, '"' || $2 || '".', '"' || $1 || '".'),
                              CASE WHEN $2 = 'annals' THEN '\mannals\.' ELSE '(?!)' END, '"' || $1 || '".', 'g'))
  FROM pg_proc AS p
  JOIN pg_namespace AS n ON n.oid = p.pronamespace
 WHERE n.nspname = $1 AND p.prokind = 'f'
   AND p.proname = ANY (ARRAY['append', 'append_checked', 'operate', 'operate_checked', 'drawn', 'advance', 'grant_access'])
   AND (position('"' || $2 || '".' IN p.prosrc) > 0 OR ($2 = 'annals' AND p.prosrc ~ '\mannals\.'))
