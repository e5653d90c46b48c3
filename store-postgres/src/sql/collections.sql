-- The names of all collections of documents, in byte order.
-- - binds: none
-- - indexes used: documents_key, one seek per collection
WITH RECURSIVE names (collection) AS (
    (SELECT d.collection FROM annals.documents AS d ORDER BY d.collection LIMIT 1)
     UNION ALL
    SELECT next.collection
      FROM names
     CROSS JOIN LATERAL (SELECT d.collection FROM annals.documents AS d WHERE d.collection > names.collection
                          ORDER BY d.collection LIMIT 1) AS next
)
SELECT collection FROM names ORDER BY collection
