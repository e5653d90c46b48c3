-- Removes documents.
-- - binds: ?1 JSON array of [collection, id]
-- - indexes used: the primary key, one seek per document
DELETE FROM documents
 WHERE (collection, id) IN (SELECT wanted.value ->> 0, wanted.value ->> 1 FROM json_each(?1) AS wanted)
