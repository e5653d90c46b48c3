-- Documents of a collection in byte order of their ids.
-- The limit is an expression (+ 0): with a plain bind, SQLite would prepare the statement again on every use.
-- - binds: ?1 collection, ?2 the id after which to start, ?3 limit
-- - indexes used: the primary key
SELECT 0, collection, id, version, body, due
  FROM documents
 WHERE collection = ?1 AND id > ?2
 ORDER BY id
 LIMIT ?3 + 0
