-- Documents of a collection in byte order of their ids.
-- - binds: $1 collection, $2 the id after which to start, $3 limit
-- - indexes used: documents_key
SELECT 0::bigint, collection, id, version, body, due
  FROM annals.documents
 WHERE collection = $1 AND id > $2
 ORDER BY id
 LIMIT $3
