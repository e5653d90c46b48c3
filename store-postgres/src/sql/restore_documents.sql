-- Inserts documents with the contents that they had in another store.
-- - binds: $1 collections, $2 ids, $3 versions, $4 bodies, $5 due
-- - indexes used: documents_key, one seek per document
INSERT INTO annals.documents (collection, id, version, body, due)
SELECT w.collection, w.id, w.version, w.body::json, w.due
  FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::timestamptz[]) AS w (collection, id, version, body, due)
    ON CONFLICT (collection, id) DO UPDATE SET version = excluded.version, body = excluded.body, due = excluded.due
