-- Documents of a collection that are due, earliest first.
-- The limit is an expression (+ 0): with a plain bind, SQLite would prepare the statement again on every use.
-- - binds: ?1 collection, ?2 due by this time, ?3 limit
-- - indexes used: documents_due
SELECT 0, collection, id, version, body, due
  FROM documents
 WHERE collection = ?1 AND due IS NOT NULL AND due <= ?2
 ORDER BY due, id
 LIMIT ?3 + 0
