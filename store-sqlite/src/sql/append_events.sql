-- Appends events. The code repeats the row of binds to a few fixed widths; rows left unbound are NULL and not inserted.
-- binds: position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at
-- FAIL, because a failure ends the whole transaction anyway: SQLite then keeps no journal to undo half a statement.
-- index: grows the primary key at its end, and events_stream_version
INSERT OR FAIL INTO events (position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
SELECT * FROM (VALUES
(?, ?, ?, ?, ?, ?, ?, ?, ?)
) WHERE column1 IS NOT NULL
