-- The last position that a page of the log may examine.
-- The limit is an expression (+ 0): with a plain bind, SQLite would prepare the statement again on every use.
-- - binds: ?1 the position after which to start, ?2 the number of events to examine
-- - returns: NULL if there is no event
-- - indexes used: the primary key
SELECT max(position) FROM (SELECT position FROM events WHERE position > ?1 ORDER BY position LIMIT ?2 + 0)
