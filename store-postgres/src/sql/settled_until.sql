-- The position that a page of the log may look at last, where no event can come in any more.
-- binds: $1 after this position, $2 up to this position, $3 how many events to look at
-- gives: NULL where there is none
-- index: events_position_key
SELECT max(position)
  FROM (SELECT position FROM annals.events WHERE position > $1 AND position <= $2 ORDER BY position LIMIT $3) AS page
