-- What an operator does is recorded in the log, beside the documents that it changes: so the access `operator` must append, and
-- nothing but that. This is `append` with the rights of the owner, for events that record an act, in the streams they belong to.
CREATE FUNCTION annals.operate(
    streams text[], stream_guesses bigint[], held boolean[],
    collections text[], ids text[], document_guesses bigint[], fresh boolean[], document_steps bigint[], bodies text[],
    dues timestamptz[],
    ranks int[], event_streams int[], stream_ids text[], event_steps bigint[], event_ids uuid[], types text[],
    schema_versions int[], datas text[], metadatas text[],
    OUT positions bigint[], OUT stream_versions bigint[], OUT document_versions bigint[],
    OUT recorded timestamptz)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
#variable_conflict use_column
BEGIN
    IF EXISTS (SELECT FROM unnest(operate.types, operate.stream_ids) AS w (type, stream_id)
                WHERE ((w.type LIKE 'operator.%' AND w.stream_id LIKE 'operator-%')
                       OR (w.type = 'saga.requested' AND w.stream_id LIKE 'saga.%')) IS NOT TRUE) THEN
        RAISE EXCEPTION 'annals: access operator appends operator.* and saga.requested, and no other events'
              USING ERRCODE = 'insufficient_privilege';
    END IF;
    SELECT a.positions, a.stream_versions, a.document_versions, a.recorded
      INTO positions, stream_versions, document_versions, recorded
      FROM annals.append(
               operate.streams, operate.stream_guesses, operate.held,
               operate.collections, operate.ids, operate.document_guesses, operate.fresh, operate.document_steps,
               operate.bodies, operate.dues,
               operate.ranks, operate.event_streams, operate.stream_ids, operate.event_steps, operate.event_ids, operate.types,
               operate.schema_versions, operate.datas, operate.metadatas) AS a;
END
$body$;
REVOKE EXECUTE ON FUNCTION annals.operate FROM PUBLIC;

-- As before, and `operate` for operators:
--
--   reader    reads everything: for reports, and for those who follow the log elsewhere
--   operator  also changes documents and records that: redrives and drops dead letters, moves checkpoints, asks sagas
--   writer    also appends any events: what a service needs
CREATE OR REPLACE FUNCTION annals.grant_access(role name, access text) RETURNS void LANGUAGE plpgsql AS $body$
BEGIN
    IF access NOT IN ('reader', 'operator', 'writer') THEN
        RAISE EXCEPTION 'annals: access is reader, operator or writer, not %', access USING ERRCODE = 'invalid_parameter_value';
    END IF;
    EXECUTE format(
        'GRANT USAGE ON SCHEMA %s TO %I',
        (SELECT c.relnamespace::regnamespace FROM pg_class AS c WHERE c.oid = 'annals.events'::regclass), role);
    EXECUTE format(
        'GRANT SELECT ON annals.events, annals.documents, annals.migrations, annals.events_position, annals.sagas, '
        'annals.checkpoints, annals.dead_letters TO %I', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION annals.drawn, annals.advance TO %I', role);
    IF access IN ('operator', 'writer') THEN
        EXECUTE format('GRANT EXECUTE ON FUNCTION annals.append, annals.operate TO %I', role);
        EXECUTE format('GRANT INSERT, UPDATE, DELETE ON annals.documents TO %I', role);
    END IF;
    IF access = 'writer' THEN
        EXECUTE format('GRANT INSERT ON annals.events TO %I', role);
        EXECUTE format('GRANT USAGE ON SEQUENCE annals.events_position TO %I', role);
    END IF;
END
$body$;

-- Those who were operators or writers before.
DO $body$
DECLARE
    role name;
BEGIN
    FOR role IN SELECT pg_get_userbyid(a.grantee)
                  FROM pg_proc AS p, aclexplode(p.proacl) AS a
                 WHERE p.oid = 'annals.append'::regproc AND a.grantee NOT IN (0, p.proowner)
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION annals.operate TO %I', role);
    END LOOP;
END
$body$;
