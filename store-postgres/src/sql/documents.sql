-- Documents by key. Because this is one statement, all documents come from one snapshot.
-- - binds: $1 collections, $2 ids
-- - returns: a row for each document that exists; the first column is the index of its key, starting at 1
-- - indexes used: documents_key, one seek per document
SELECT wanted.n, held.collection, held.id, held.version, held.body, held.due
  FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS wanted (collection, id, n)
  JOIN annals.documents AS held ON held.collection = wanted.collection AND held.id = wanted.id
