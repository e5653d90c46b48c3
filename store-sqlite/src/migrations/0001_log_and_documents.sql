-- The log. STRICT, so that no row can hold a value of another kind than its column; times are microseconds since 1970 UTC.
CREATE TABLE events (
    position       INTEGER PRIMARY KEY CHECK (position > 0),
    stream_id      TEXT    NOT NULL,
    version        INTEGER NOT NULL CHECK (version > 0),
    event_id       TEXT    NOT NULL,
    type           TEXT    NOT NULL,
    schema_version INTEGER NOT NULL,
    data           TEXT    NOT NULL,
    metadata       TEXT    NOT NULL,
    recorded_at    INTEGER NOT NULL,
    CONSTRAINT events_stream_version UNIQUE (stream_id, version)
) STRICT;

CREATE TRIGGER events_never_change BEFORE UPDATE ON events
BEGIN
    SELECT RAISE(ABORT, 'annals: events are never changed');
END;

CREATE TRIGGER events_never_go BEFORE DELETE ON events
BEGIN
    SELECT RAISE(ABORT, 'annals: events are never deleted');
END;

-- INSERT OR REPLACE would take an event away without a DELETE that a trigger sees. (Costs 5 to 15 % of the rate of commits
-- of one event each, and less of larger ones.)
CREATE TRIGGER events_are_never_replaced BEFORE INSERT ON events
    WHEN EXISTS (SELECT 1 FROM events WHERE position = NEW.position)
      OR EXISTS (SELECT 1 FROM events WHERE stream_id = NEW.stream_id AND version = NEW.version)
BEGIN
    SELECT RAISE(ABORT, 'annals: events are never replaced');
END;

-- Checkpoints, snapshots, read models, timers, dead letters. The key is the table, so a scan in key order reads it in order.
CREATE TABLE documents (
    collection TEXT    NOT NULL,
    id         TEXT    NOT NULL,
    version    INTEGER NOT NULL CHECK (version > 0),
    body       TEXT    NOT NULL,
    due        INTEGER,
    PRIMARY KEY (collection, id)
) STRICT, WITHOUT ROWID;

-- Only what waits for its time is in it; the id follows by itself, because it is part of the table's key.
CREATE INDEX documents_due ON documents (collection, due) WHERE due IS NOT NULL;
