-- What kind of server answers.
-- binds: none
-- gives: whether it is a standby, and whether the settings that a connection starts with have come through; and its time
-- index: none
SELECT pg_is_in_recovery(), current_setting('enable_seqscan') = 'off', clock_timestamp()
