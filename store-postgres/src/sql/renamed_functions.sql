-- What makes the functions of a schema anew that name another one: each as it is, with owner and grants, but for the name.
-- binds: $1 schema, $2 the schema that they name
-- index: those of the catalogue
SELECT replace(pg_get_functiondef(p.oid), p.prosrc,
               replace(replace(p.prosrc, '"' || $2 || '".', '"' || $1 || '".'), $2 || '.', '"' || $1 || '".'))
  FROM pg_proc AS p
  JOIN pg_namespace AS n ON n.oid = p.pronamespace
 WHERE n.nspname = $1 AND p.prokind = 'f'
   AND (position('"' || $2 || '".' IN p.prosrc) > 0 OR position($2 || '.' IN p.prosrc) > 0)
