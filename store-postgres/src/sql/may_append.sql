-- Whether this role may append any events; an operator may append acts.
-- binds: none
SELECT has_table_privilege('annals.events', 'INSERT') OR NOT has_function_privilege('annals.operate'::regproc, 'EXECUTE')
