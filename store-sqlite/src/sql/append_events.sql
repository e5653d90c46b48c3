-- Appends events. The code repeats the row of binds to one of a few fixed widths. Rows that are left unbound are NULL
-- and are not inserted.
-- With OR FAIL, SQLite keeps no journal to undo half a statement. None is needed, because a failure ends the whole
-- transaction anyway.
-- - binds: position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at
-- - indexes used: none; adds entries to the end of the primary key and to events_stream_version
INSERT OR FAIL INTO events (position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
SELECT * FROM (VALUES
(?, ?, ?, ?, ?, ?, ?, ?, ?)
) WHERE column1 IS NOT NULL
