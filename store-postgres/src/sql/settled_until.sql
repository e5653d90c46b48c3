-- The last position that a page of the settled log may examine.
-- - binds: $1 the position after which to start, $2 the last position to read, $3 the number of events to examine
-- - returns: NULL if there is no event
-- - indexes used: events_position_key
SELECT max(position)
  FROM (SELECT position FROM annals.events WHERE position > $1 AND position <= $2 ORDER BY position LIMIT $3) AS page
