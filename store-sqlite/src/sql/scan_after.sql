-- Documents of a collection in byte order of their ids.
-- binds: ?1 collection, ?2 after this id, ?3 limit
-- A limit that is a plain bind would make SQLite prepare the statement again on every use.
-- index: the primary key
SELECT 0, collection, id, version, body, due
  FROM documents
 WHERE collection = ?1 AND id > ?2
 ORDER BY id
 LIMIT ?3 + 0
