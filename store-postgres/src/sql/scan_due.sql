-- Documents of a collection that are due, earliest first.
-- - binds: $1 collection, $2 due by this time, $3 limit
-- - indexes used: documents_due
SELECT 0::bigint, collection, id, version, body, due
  FROM annals.documents
 WHERE collection = $1 AND due IS NOT NULL AND due <= $2
 ORDER BY due, id
 LIMIT $3
