-- Inserts events with the contents that they had in another store. Like every writer of events, COPY locks the table
-- before it writes a row.
-- - binds: none; the caller sends the rows after the statement
-- - indexes used: none; adds entries to events_position_key and events_stream_version
COPY annals.events (position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
  FROM STDIN (FORMAT binary)
