-- The same function; the absence of a document counts.
--
-- A commit may rely on it that a document does not exist, without creating it: it removes the document, and expects version 0. No row
-- can be locked for that, so another process could create the document at the same time, relying in turn on the absence of
-- what this commit writes, and both would hold. Such a document is therefore inserted and deleted again: the key makes
-- whoever else creates it, or relies on its absence, wait for the end of this transaction, and look again.
CREATE OR REPLACE FUNCTION annals.append_checked(
    streams text[], stream_guesses bigint[], known_events uuid[], held boolean[],
    collections text[], ids text[], document_guesses bigint[], fresh boolean[], document_steps bigint[], bodies text[],
    dues timestamptz[],
    ranks int[], event_streams int[], stream_ids text[], event_steps bigint[], event_ids uuid[], types text[],
    schema_versions int[], datas text[], metadatas text[],
    OUT positions bigint[], OUT stream_versions bigint[], OUT stream_events uuid[], OUT document_versions bigint[],
    OUT recorded timestamptz)
LANGUAGE plpgsql AS $body$
#variable_conflict use_column
DECLARE
    few boolean := cardinality(append_checked.streams) + cardinality(append_checked.ids) + cardinality(append_checked.ranks) <= 24
                   AND (cardinality(append_checked.streams) = 1 OR array_position(append_checked.held, NULL) IS NULL)
                   AND coalesce(array_lower(append_checked.types, 1), 1) = 1 AND coalesce(array_lower(append_checked.stream_ids, 1), 1) = 1;
    hold boolean := true;
    -- Whether a document must remain absent.
    absent boolean := false;
    -- What takes a gate gives nothing back, and an expression must put it somewhere.
    nothing text;
    standing bigint;
    event uuid;
    written bigint;
    expected bigint;
    last timestamptz;
BEGIN
    -- With any other, what follows would look at the time before the gates were taken.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'annals: appending needs isolation level read committed' USING ERRCODE = 'AN003';
    END IF;
    IF cardinality(append_checked.streams) = 1 AND NOT append_checked.held[1] THEN
        -- What comes most often when there is little to do: an expression, since no plan need be started for that.
        nothing := pg_advisory_xact_lock_shared(
            'annals.events'::regclass::oid::int, (hashtextextended(append_checked.streams[1], 0) & 1023)::int);
    ELSIF cardinality(append_checked.streams) > 0 THEN
        PERFORM CASE WHEN g.held THEN pg_advisory_xact_lock('annals.events'::regclass::oid::int, g.gate)
                     ELSE pg_advisory_xact_lock_shared('annals.events'::regclass::oid::int, g.gate) END
           FROM (SELECT (hashtextextended(w.stream, 0) & 1023)::int AS gate, w.held
                   FROM unnest(append_checked.streams, append_checked.held) AS w (stream, held)
                  WHERE w.held IS NOT NULL
                  ORDER BY gate, w.held DESC
                 OFFSET 0) AS g;
    END IF;

    stream_versions := '{}';
    stream_events := '{}';
    document_versions := '{}';
    IF few THEN
        FOR n IN 1 .. cardinality(append_checked.streams) LOOP
            -- index: events_stream_version, one seek
            SELECT e.version, e.event_id INTO standing, event FROM annals.events AS e
             WHERE e.stream_id = append_checked.streams[n]
             ORDER BY e.version DESC LIMIT 1;
            stream_versions[n] := coalesce(standing, 0);
            stream_events[n] := event;
            hold := hold AND (append_checked.stream_guesses[n] IS NULL OR append_checked.stream_guesses[n] = stream_versions[n])
                    AND (append_checked.known_events[n] IS NULL OR append_checked.known_events[n] IS NOT DISTINCT FROM event);
        END LOOP;
        FOR n IN 1 .. cardinality(append_checked.ids) LOOP
            -- index: documents_key, one seek
            SELECT d.version INTO standing FROM annals.documents AS d
             WHERE d.collection = append_checked.collections[n] AND d.id = append_checked.ids[n];
            document_versions[n] := coalesce(standing, 0);
            hold := hold AND (append_checked.document_guesses[n] IS NULL OR append_checked.document_guesses[n] = document_versions[n]);
        END LOOP;
    ELSE
        -- binds: streams, stream_guesses; index: events_stream_version, one seek a stream
        SELECT coalesce(array_agg(s.standing ORDER BY s.n), '{}'), coalesce(array_agg(s.event ORDER BY s.n), '{}'),
               coalesce(bool_and((s.guess IS NULL OR s.guess = s.standing)
                                 AND (s.known IS NULL OR s.known IS NOT DISTINCT FROM s.event)), true)
          INTO stream_versions, stream_events, hold
          FROM (SELECT w.n, w.guess, w.known, coalesce(last.version, 0) AS standing, last.event_id AS event
                  FROM unnest(append_checked.streams, append_checked.stream_guesses, append_checked.known_events)
                       WITH ORDINALITY AS w (stream, guess, known, n)
                  LEFT JOIN LATERAL (SELECT e.version, e.event_id FROM annals.events AS e WHERE e.stream_id = w.stream
                                      ORDER BY e.version DESC LIMIT 1) AS last ON true
                 -- Keeps the planner from seeking once for each use of the result.
                OFFSET 0) AS s;
        IF cardinality(append_checked.ids) > 0 THEN
            -- index: documents_key, one seek a document
            SELECT array_agg(s.standing ORDER BY s.n), hold AND bool_and(s.guess IS NULL OR s.guess = s.standing),
                   count(*) FILTER (WHERE s.standing > 0 AND s.step IS NOT NULL)
              INTO document_versions, hold, expected
              FROM (SELECT w.n, w.guess, w.step, coalesce((SELECT d.version FROM annals.documents AS d
                                                            WHERE d.collection = w.collection AND d.id = w.id), 0) AS standing
                      FROM unnest(append_checked.collections, append_checked.ids, append_checked.document_guesses, append_checked.document_steps)
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
        FOR n IN 1 .. cardinality(append_checked.ids) LOOP
            standing := document_versions[n];
            CONTINUE WHEN standing = 0 OR append_checked.document_steps[n] IS NULL OR append_checked.bodies[n] IS NULL;
            -- index: documents_key, one seek
            UPDATE annals.documents AS d
               SET version = CASE WHEN append_checked.fresh[n] THEN 0 ELSE standing END + append_checked.document_steps[n],
                   body = append_checked.bodies[n]::json, due = append_checked.dues[n]
             WHERE d.collection = append_checked.collections[n] AND d.id = append_checked.ids[n] AND d.version = standing;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'annals: a document was put by another process' USING ERRCODE = 'AN001';
            END IF;
        END LOOP;
        FOR n IN 1 .. cardinality(append_checked.ids) LOOP
            standing := document_versions[n];
            CONTINUE WHEN standing = 0 OR append_checked.document_steps[n] IS NULL OR append_checked.bodies[n] IS NOT NULL;
            -- index: documents_key, one seek
            DELETE FROM annals.documents AS d
             WHERE d.collection = append_checked.collections[n] AND d.id = append_checked.ids[n] AND d.version = standing;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'annals: a document was put by another process' USING ERRCODE = 'AN001';
            END IF;
        END LOOP;
        FOR n IN 1 .. cardinality(append_checked.ids) LOOP
            CONTINUE WHEN document_versions[n] > 0 OR append_checked.document_steps[n] IS NULL
                          OR append_checked.bodies[n] IS NULL AND append_checked.document_guesses[n] IS NULL;
            absent := absent OR append_checked.bodies[n] IS NULL;
            -- index: grows documents_key
            INSERT INTO annals.documents (collection, id, version, body, due)
            VALUES (append_checked.collections[n], append_checked.ids[n], greatest(append_checked.document_steps[n], 1),
                    coalesce(append_checked.bodies[n], 'null')::json, append_checked.dues[n]);
        END LOOP;
    ELSE
        IF expected > 0 THEN
            -- index: documents_key, one seek a document
            UPDATE annals.documents AS d
               SET version = CASE WHEN w.fresh THEN 0 ELSE w.standing END + w.step, body = w.body::json, due = w.due
              FROM unnest(append_checked.collections, append_checked.ids, document_versions, append_checked.fresh, append_checked.document_steps, append_checked.bodies,
                          append_checked.dues) AS w (collection, id, standing, fresh, step, body, due)
             WHERE w.standing > 0 AND w.step IS NOT NULL AND w.body IS NOT NULL
               AND d.collection = w.collection AND d.id = w.id AND d.version = w.standing;
            GET DIAGNOSTICS written = ROW_COUNT;
            expected := expected - written;
            IF expected > 0 THEN
                -- index: documents_key, one seek a document
                DELETE FROM annals.documents AS d
                 USING unnest(append_checked.collections, append_checked.ids, document_versions, append_checked.document_steps, append_checked.bodies)
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
            SELECT w.collection, w.id, greatest(w.step, 1), coalesce(w.body, 'null')::json, w.due
              FROM unnest(append_checked.collections, append_checked.ids, document_versions, append_checked.document_guesses,
                          append_checked.document_steps, append_checked.bodies, append_checked.dues)
                   AS w (collection, id, standing, guess, step, body, due)
             WHERE w.standing = 0 AND w.step IS NOT NULL AND (w.body IS NOT NULL OR w.guess IS NOT NULL);
            absent := EXISTS (SELECT FROM unnest(document_versions, append_checked.document_guesses, append_checked.document_steps,
                                                 append_checked.bodies) AS w (standing, guess, step, body)
                               WHERE w.standing = 0 AND w.guess IS NOT NULL AND w.step IS NOT NULL AND w.body IS NULL);
        END IF;
    END IF;
    IF absent THEN
        -- index: documents_key, one seek a document
        DELETE FROM annals.documents AS d
         USING unnest(append_checked.collections, append_checked.ids, document_versions, append_checked.document_guesses,
                      append_checked.document_steps, append_checked.bodies) AS w (collection, id, standing, guess, step, body)
         WHERE w.standing = 0 AND w.guess IS NOT NULL AND w.step IS NOT NULL AND w.body IS NULL
           AND d.collection = w.collection AND d.id = w.id;
    END IF;

    positions := '{}';
    IF coalesce(cardinality(append_checked.ranks), 0) = 0 THEN
        RETURN;
    END IF;
    -- The order matters: readers of the log know the transactions that may hold a position by this lock.
    LOCK TABLE annals.events IN ROW EXCLUSIVE MODE;
    IF few THEN
        FOR n IN 1 .. cardinality(append_checked.ranks) LOOP
            positions[n] := nextval('annals.events_position');
        END LOOP;
    ELSE
        SELECT array_agg(nextval('annals.events_position')) INTO positions FROM generate_series(1, cardinality(append_checked.ranks));
    END IF;
    -- By the clock of this server, but not before the last event, unless that is dated ahead by a day or more: by hand.
    recorded := clock_timestamp();
    SELECT e.recorded_at INTO last FROM annals.events AS e WHERE e.position < positions[1] ORDER BY e.position DESC LIMIT 1;
    IF last > recorded AND last < recorded + interval '1 day' THEN
        recorded := last;
    END IF;
    -- index: grows events_position_key at its end, and events_stream_version
    IF few THEN
        FOR n IN 1 .. cardinality(append_checked.ranks) LOOP
            INSERT INTO annals.events
                   (position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
            VALUES (positions[append_checked.ranks[n]], append_checked.stream_ids[n],
                    stream_versions[append_checked.event_streams[n]] + append_checked.event_steps[n], append_checked.event_ids[n], append_checked.types[n],
                    append_checked.schema_versions[n], append_checked.datas[n]::json, append_checked.metadatas[n]::json, recorded);
        END LOOP;
    ELSE
        INSERT INTO annals.events
               (position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at)
        SELECT positions[w.rank], w.stream_id, stream_versions[w.stream] + w.step, w.event_id, w.type, w.schema_version,
               w.data::json, w.metadata::json, recorded
          FROM unnest(append_checked.ranks, append_checked.event_streams, append_checked.stream_ids, append_checked.event_steps, append_checked.event_ids,
                      append_checked.types, append_checked.schema_versions, append_checked.datas, append_checked.metadatas)
               AS w (rank, stream, stream_id, step, event_id, type, schema_version, data, metadata);
    END IF;
END
$body$;
