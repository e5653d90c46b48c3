-- Finds how far the log continues from a position without a gap.
-- - binds: $1 the position after which to start, $2 the number of events to examine
-- - returns: the last position before the first gap (NULL if there is no event at the next position), the id
--   of the event there, and whether there is any event after $1
-- - indexes used: events_position_key
SELECT dense.until, (SELECT e.event_id FROM annals.events AS e WHERE e.position = dense.until), dense.is_any
  FROM (SELECT max(position) FILTER (WHERE position - $1 = place) AS until, count(*) > 0 AS is_any
          FROM (SELECT position, row_number() OVER (ORDER BY position) AS place
                  FROM annals.events
                 WHERE position > $1 AND position <= (SELECT annals.drawn())
                 ORDER BY position
                 LIMIT $2) AS page) AS dense
