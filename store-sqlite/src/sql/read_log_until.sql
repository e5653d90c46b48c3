-- The position that a page of the log may look at last.
-- binds: ?1 after this position, ?2 how many events to look at
-- gives: NULL where there is none
-- A limit that is a plain bind would have SQLite prepare the statement again on every use.
-- index: the primary key
SELECT max(position) FROM (SELECT position FROM events WHERE position > ?1 ORDER BY position LIMIT ?2 + 0)
