-- Whether this role may append any event; an operator may append only the events of operator actions.
-- - binds: none
SELECT has_table_privilege('annals.events', 'INSERT') OR NOT has_function_privilege('annals.operate'::regproc, 'EXECUTE')
