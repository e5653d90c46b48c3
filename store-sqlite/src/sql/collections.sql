-- The names of all collections of documents, in byte order.
-- - binds: none
-- - indexes used: the primary key, one seek per collection
WITH RECURSIVE names (collection) AS (
    SELECT min(collection) FROM documents
     UNION ALL
    SELECT (SELECT min(collection) FROM documents WHERE collection > names.collection)
      FROM names
     WHERE names.collection IS NOT NULL
)
SELECT collection FROM names WHERE collection IS NOT NULL
