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
    SELECT RAISE(FAIL, 'annals: events are never replaced');
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

-- What operators look at. `lag` counts the events of the log after the checkpoint; a topic's offsets are no positions.
CREATE VIEW sagas AS
SELECT json_extract(body, '$.saga') AS saga, id AS saga_id, json_extract(body, '$.definition_hash') AS definition_hash,
       json_extract(body, '$.status') AS status, json_extract(body, '$.step') AS step,
       json_extract(body, '$.attempts') AS attempts, json_extract(body, '$.started_at') AS started_at,
       json_extract(body, '$.ended_at') AS ended_at, json_extract(body, '$.last_error') AS last_error
FROM documents WHERE collection >= 'saga.' AND collection < 'saga/';

CREATE VIEW checkpoints AS
SELECT rtrim(rtrim(id, '0123456789'), '/') AS subscription,
       CAST(replace(id, rtrim(id, '0123456789'), '') AS INTEGER) AS lane,
       json_extract(body, '$.next') AS position,
       CASE WHEN json_extract(body, '$.incarnation') IS NULL
            THEN (SELECT coalesce(max(position), 0) FROM events) - json_extract(body, '$.next') END AS lag,
       json_extract(body, '$.at') AS updated_at
FROM documents WHERE collection = 'checkpoint';

-- Each parked key by its first message.
CREATE VIEW dead_letters AS
SELECT min(id) AS id, json_extract(body, '$.subscription') AS subscription, json_extract(body, '$.key') AS "key",
       json_extract(body, '$.reason') AS reason, json_extract(body, '$.attempts') AS attempts,
       json_extract(body, '$.parked_at') AS parked_at, json_extract(body, '$.message') AS message, count(*) - 1 AS behind
FROM documents WHERE collection >= 'parked.' AND collection < 'parked/'
GROUP BY collection, json_extract(body, '$.key');
