-- Restores events with the contents that another store held. As for every writer of events, the table is locked before
-- a row comes in.
-- binds: none; the rows follow
-- index: grows events_position_key and events_stream_version
COPY annals.events (position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
  FROM STDIN (FORMAT binary)
