-- Documents by key. Because this is one statement, all documents come from one snapshot.
-- - binds: ?1 JSON array of [collection, id]
-- - returns: a row for each document that exists; the first column is the index of its key, starting at 0
-- - indexes used: the primary key, one seek per document
SELECT wanted.key, held.collection, held.id, held.version, held.body, held.due
  FROM json_each(?1) AS wanted
 CROSS JOIN documents AS held ON held.collection = wanted.value ->> 0 AND held.id = wanted.value ->> 1
