-- The kind of server that answers.
-- - binds: none
-- - returns: whether the server is a standby, whether the startup settings of the connection took effect, and the
--   server's time
-- - indexes used: none
SELECT pg_is_in_recovery(), current_setting('enable_seqscan') = 'off', clock_timestamp()
