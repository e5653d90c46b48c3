-- Documents by key. Because this is one statement, all documents come from one snapshot.
-- binds: ?1 JSON array of [collection, id]
-- returns: the index in ?1 first; no row for a document that does not exist
-- index: the primary key, one seek per document
SELECT wanted.key, held.collection, held.id, held.version, held.body, held.due
  FROM json_each(?1) AS wanted
 CROSS JOIN documents AS held ON held.collection = wanted.value ->> 0 AND held.id = wanted.value ->> 1
