-- The last position that a page of the settled log may examine.
-- - binds: $1 after this position, $2 up to this position, $3 how many events to examine
-- - returns: NULL if there is no event
-- - index: events_position_key
SELECT max(position)
  FROM (SELECT position FROM annals.events WHERE position > $1 AND position <= $2 ORDER BY position LIMIT $3) AS page
