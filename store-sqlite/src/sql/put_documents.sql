-- Puts documents. The code repeats the row of binds to one of a few fixed widths. Rows that are left unbound are NULL
-- and are not inserted.
-- - binds: collection, id, version, body, due
-- - indexes used: the primary key, one seek per document; adds entries to documents_due
INSERT OR FAIL INTO documents (collection, id, version, body, due)
SELECT * FROM (VALUES
(?, ?, ?, ?, ?)
) WHERE column1 IS NOT NULL
ON CONFLICT (collection, id) DO UPDATE SET version = excluded.version, body = excluded.body, due = excluded.due
