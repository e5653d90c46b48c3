-- Documents by key. Because this is one statement, all documents come from one snapshot.
-- binds: $1 collections, $2 ids
-- returns: the index in $1 first, from 1; no row for a document that does not exist
-- index: documents_key, one seek per document
SELECT wanted.n, held.collection, held.id, held.version, held.body, held.due
  FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS wanted (collection, id, n)
  JOIN annals.documents AS held ON held.collection = wanted.collection AND held.id = wanted.id
