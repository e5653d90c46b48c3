-- Puts documents. The code repeats the row of binds to a few fixed widths; rows left unbound are NULL and not inserted.
-- binds: collection, id, version, body, due
-- index: the primary key, one seek per document; documents_due
INSERT OR FAIL INTO documents (collection, id, version, body, due)
SELECT * FROM (VALUES
(?, ?, ?, ?, ?)
) WHERE column1 IS NOT NULL
ON CONFLICT (collection, id) DO UPDATE SET version = excluded.version, body = excluded.body, due = excluded.due
