-- The same function; what has few rows takes them one by one. A statement over a set of rows costs as much to start as a dozen of
-- those over one row, and most calls come alone, with an event or two and a checkpoint. Beyond that, sets win.
--
-- Sets it is, too, where several streams are only looked at, so that all are seen at one moment; and where arrays do not count from 1:
-- `operate` checks them as sets.
CREATE OR REPLACE FUNCTION annals.append(
    streams text[], stream_guesses bigint[], held boolean[],
    collections text[], ids text[], document_guesses bigint[], fresh boolean[], document_steps bigint[], bodies text[],
    dues timestamptz[],
    ranks int[], event_streams int[], stream_ids text[], event_steps bigint[], event_ids uuid[], types text[],
    schema_versions int[], datas text[], metadatas text[],
    OUT positions bigint[], OUT stream_versions bigint[], OUT document_versions bigint[],
    OUT recorded timestamptz)
LANGUAGE plpgsql AS $body$
#variable_conflict use_column
DECLARE
    few boolean := cardinality(append.streams) + cardinality(append.ids) + cardinality(append.ranks) <= 24
                   AND (cardinality(append.streams) = 1 OR array_position(append.held, NULL) IS NULL)
                   AND coalesce(array_lower(append.types, 1), 1) = 1 AND coalesce(array_lower(append.stream_ids, 1), 1) = 1;
    hold boolean := true;
    -- What takes a gate gives nothing back, and an expression must put it somewhere.
    nothing text;
    standing bigint;
    written bigint;
    expected bigint;
    last timestamptz;
BEGIN
    -- With any other, what follows would look at the time before the gates were taken.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'annals: appending needs isolation level read committed' USING ERRCODE = 'AN003';
    END IF;
    IF cardinality(append.streams) = 1 AND NOT append.held[1] THEN
        -- What comes most often when there is little to do: an expression, since no plan need be started for that.
        nothing := pg_advisory_xact_lock_shared(
            'annals.events'::regclass::oid::int, (hashtextextended(append.streams[1], 0) & 1023)::int);
    ELSIF cardinality(append.streams) > 0 THEN
        PERFORM CASE WHEN g.held THEN pg_advisory_xact_lock('annals.events'::regclass::oid::int, g.gate)
                     ELSE pg_advisory_xact_lock_shared('annals.events'::regclass::oid::int, g.gate) END
           FROM (SELECT (hashtextextended(w.stream, 0) & 1023)::int AS gate, w.held
                   FROM unnest(append.streams, append.held) AS w (stream, held)
                  WHERE w.held IS NOT NULL
                  ORDER BY gate, w.held DESC
                 OFFSET 0) AS g;
    END IF;

    stream_versions := '{}';
    document_versions := '{}';
    IF few THEN
        FOR n IN 1 .. cardinality(append.streams) LOOP
            -- index: events_stream_version, one seek
            SELECT e.version INTO standing FROM annals.events AS e WHERE e.stream_id = append.streams[n]
             ORDER BY e.version DESC LIMIT 1;
            stream_versions[n] := coalesce(standing, 0);
            hold := hold AND (append.stream_guesses[n] IS NULL OR append.stream_guesses[n] = stream_versions[n]);
        END LOOP;
        FOR n IN 1 .. cardinality(append.ids) LOOP
            -- index: documents_key, one seek
            SELECT d.version INTO standing FROM annals.documents AS d
             WHERE d.collection = append.collections[n] AND d.id = append.ids[n];
            document_versions[n] := coalesce(standing, 0);
            hold := hold AND (append.document_guesses[n] IS NULL OR append.document_guesses[n] = document_versions[n]);
        END LOOP;
    ELSE
        -- binds: streams, stream_guesses; index: events_stream_version, one seek a stream
        SELECT coalesce(array_agg(s.standing ORDER BY s.n), '{}'),
               coalesce(bool_and(s.guess IS NULL OR s.guess = s.standing), true)
          INTO stream_versions, hold
          FROM (SELECT w.n, w.guess, coalesce((SELECT e.version FROM annals.events AS e WHERE e.stream_id = w.stream
                                                ORDER BY e.version DESC LIMIT 1), 0) AS standing
                  FROM unnest(append.streams, append.stream_guesses) WITH ORDINALITY AS w (stream, guess, n)
                 -- Keeps the planner from seeking once for each use of the result.
                OFFSET 0) AS s;
        IF cardinality(append.ids) > 0 THEN
            -- index: documents_key, one seek a document
            SELECT array_agg(s.standing ORDER BY s.n), hold AND bool_and(s.guess IS NULL OR s.guess = s.standing),
                   count(*) FILTER (WHERE s.standing > 0 AND s.step IS NOT NULL)
              INTO document_versions, hold, expected
              FROM (SELECT w.n, w.guess, w.step, coalesce((SELECT d.version FROM annals.documents AS d
                                                            WHERE d.collection = w.collection AND d.id = w.id), 0) AS standing
                      FROM unnest(append.collections, append.ids, append.document_guesses, append.document_steps)
                           WITH ORDINALITY AS w (collection, id, guess, step, n)
                    OFFSET 0) AS s;
        END IF;
    END IF;
    IF NOT hold THEN
        RETURN;
    END IF;

    -- Compare-and-set: the version that was looked at must still be there, whoever was faster.
    IF few THEN
        -- In the order of the sets below, or two calls could wait for each other.
        FOR n IN 1 .. cardinality(append.ids) LOOP
            standing := document_versions[n];
            CONTINUE WHEN standing = 0 OR append.document_steps[n] IS NULL OR append.bodies[n] IS NULL;
            -- index: documents_key, one seek
            UPDATE annals.documents AS d
               SET version = CASE WHEN append.fresh[n] THEN 0 ELSE standing END + append.document_steps[n],
                   body = append.bodies[n]::json, due = append.dues[n]
             WHERE d.collection = append.collections[n] AND d.id = append.ids[n] AND d.version = standing;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'annals: a document was put by another process' USING ERRCODE = 'AN001';
            END IF;
        END LOOP;
        FOR n IN 1 .. cardinality(append.ids) LOOP
            standing := document_versions[n];
            CONTINUE WHEN standing = 0 OR append.document_steps[n] IS NULL OR append.bodies[n] IS NOT NULL;
            -- index: documents_key, one seek
            DELETE FROM annals.documents AS d
             WHERE d.collection = append.collections[n] AND d.id = append.ids[n] AND d.version = standing;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'annals: a document was put by another process' USING ERRCODE = 'AN001';
            END IF;
        END LOOP;
        FOR n IN 1 .. cardinality(append.ids) LOOP
            CONTINUE WHEN document_versions[n] > 0 OR append.document_steps[n] IS NULL OR append.bodies[n] IS NULL;
            -- index: grows documents_key
            INSERT INTO annals.documents (collection, id, version, body, due)
            VALUES (append.collections[n], append.ids[n], append.document_steps[n], append.bodies[n]::json, append.dues[n]);
        END LOOP;
    ELSE
        IF expected > 0 THEN
            -- index: documents_key, one seek a document
            UPDATE annals.documents AS d
               SET version = CASE WHEN w.fresh THEN 0 ELSE w.standing END + w.step, body = w.body::json, due = w.due
              FROM unnest(append.collections, append.ids, document_versions, append.fresh, append.document_steps, append.bodies,
                          append.dues) AS w (collection, id, standing, fresh, step, body, due)
             WHERE w.standing > 0 AND w.step IS NOT NULL AND w.body IS NOT NULL
               AND d.collection = w.collection AND d.id = w.id AND d.version = w.standing;
            GET DIAGNOSTICS written = ROW_COUNT;
            expected := expected - written;
            IF expected > 0 THEN
                -- index: documents_key, one seek a document
                DELETE FROM annals.documents AS d
                 USING unnest(append.collections, append.ids, document_versions, append.document_steps, append.bodies)
                       AS w (collection, id, standing, step, body)
                 WHERE w.standing > 0 AND w.step IS NOT NULL AND w.body IS NULL
                   AND d.collection = w.collection AND d.id = w.id AND d.version = w.standing;
                GET DIAGNOSTICS written = ROW_COUNT;
                IF written <> expected THEN
                    RAISE EXCEPTION 'annals: a document was put by another process' USING ERRCODE = 'AN001';
                END IF;
            END IF;
        END IF;
        IF 0 = ANY (document_versions) THEN
            -- index: grows documents_key
            INSERT INTO annals.documents (collection, id, version, body, due)
            SELECT w.collection, w.id, w.step, w.body::json, w.due
              FROM unnest(append.collections, append.ids, document_versions, append.document_steps, append.bodies, append.dues)
                   AS w (collection, id, standing, step, body, due)
             WHERE w.standing = 0 AND w.step IS NOT NULL AND w.body IS NOT NULL;
        END IF;
    END IF;

    positions := '{}';
    IF coalesce(cardinality(append.ranks), 0) = 0 THEN
        RETURN;
    END IF;
    -- The order matters: readers of the log know the transactions that may hold a position by this lock.
    LOCK TABLE annals.events IN ROW EXCLUSIVE MODE;
    IF few THEN
        FOR n IN 1 .. cardinality(append.ranks) LOOP
            positions[n] := nextval('annals.events_position');
        END LOOP;
    ELSE
        SELECT array_agg(nextval('annals.events_position')) INTO positions FROM generate_series(1, cardinality(append.ranks));
    END IF;
    -- By the clock of this server, but not before the last event, unless that is dated ahead by a day or more: by hand.
    recorded := clock_timestamp();
    SELECT e.recorded_at INTO last FROM annals.events AS e WHERE e.position < positions[1] ORDER BY e.position DESC LIMIT 1;
    IF last > recorded AND last < recorded + interval '1 day' THEN
        recorded := last;
    END IF;
    -- index: grows events_position_key at its end, and events_stream_version
    IF few THEN
        FOR n IN 1 .. cardinality(append.ranks) LOOP
            INSERT INTO annals.events
                   (position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
            VALUES (positions[append.ranks[n]], append.stream_ids[n],
                    stream_versions[append.event_streams[n]] + append.event_steps[n], append.event_ids[n], append.types[n],
                    append.schema_versions[n], append.datas[n]::json, append.metadatas[n]::json, recorded);
        END LOOP;
    ELSE
        INSERT INTO annals.events
               (position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
        SELECT positions[w.rank], w.stream_id, stream_versions[w.stream] + w.step, w.event_id, w.type, w.schema_version,
               w.data::json, w.metadata::json, recorded
          FROM unnest(append.ranks, append.event_streams, append.stream_ids, append.event_steps, append.event_ids,
                      append.types, append.schema_versions, append.datas, append.metadatas)
               AS w (rank, stream, stream_id, step, event_id, type, schema_version, data, metadata);
    END IF;
END
$body$;
