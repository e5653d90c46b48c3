-- Documents by key; one statement, hence one snapshot.
-- binds: $1 collections, $2 ids
-- gives: the index in $1 first, from 1; no row for a document that does not exist
-- index: documents_key, one seek a document
SELECT wanted.n, held.collection, held.id, held.version, held.body, held.due
  FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS wanted (collection, id, n)
  JOIN annals.documents AS held ON held.collection = wanted.collection AND held.id = wanted.id
