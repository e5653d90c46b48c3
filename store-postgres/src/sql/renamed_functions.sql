-- Definitions that recreate the functions of a schema that name another schema. Only the name changes; owner and grants
-- are kept. Among the names, only `annals` may appear without quotes. A name is replaced only as a whole word.
-- binds: $1 schema, $2 the schema that the functions name
-- index: those of the catalogue
SELECT replace(pg_get_functiondef(p.oid), p.prosrc,
               regexp_replace(replace(p.prosrc, '"' || $2 || '".', '"' || $1 || '".'),
                              CASE WHEN $2 = 'annals' THEN '\mannals\.' ELSE '(?!)' END, '"' || $1 || '".', 'g'))
  FROM pg_proc AS p
  JOIN pg_namespace AS n ON n.oid = p.pronamespace
 WHERE n.nspname = $1 AND p.prokind = 'f'
   AND p.proname = ANY (ARRAY['append', 'append_checked', 'operate', 'operate_checked', 'drawn', 'advance', 'grant_access'])
   AND (position('"' || $2 || '".' IN p.prosrc) > 0 OR ($2 = 'annals' AND p.prosrc ~ '\mannals\.'))
