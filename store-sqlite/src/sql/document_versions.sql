-- The versions of some documents, in one row.
-- - binds: ?1 JSON array of [collection, id]
-- - returns: JSON array of versions in the order of ?1 (0: no such document)
-- - indexes used: the primary key, one seek per document
SELECT json_group_array(
           (SELECT coalesce(max(version), 0) FROM documents
             WHERE collection = wanted.value ->> 0 AND id = wanted.value ->> 1) ORDER BY wanted.key)
  FROM json_each(?1) AS wanted
