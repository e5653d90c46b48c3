-- Whether a session is on the primary, and which log it has. The query is sent without binds, because behind a pooler
-- it is the last part of the message that begins a transaction.
-- - placeholders: {last} is the position of the last event that was seen, or NULL
-- - returns: whether the server is a standby; whether transactions are read-only; the cluster, its timeline and the
--   table; the id of the event at that position
-- - indexes used: events_position_key, one seek
SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on',
       CASE WHEN pg_is_in_recovery() THEN ''
            ELSE (SELECT system_identifier FROM pg_control_system()) || '/'
                 || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) || '/' || 'annals.events'::regclass::oid END,
       (SELECT e.event_id FROM annals.events AS e WHERE e.position = {last})
