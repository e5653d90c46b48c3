-- Brings the sequence past the events that stand beyond it, as after a restore of the table alone. Positions beyond 2^62 are
-- left out of this: no log gets there, so they were put in by hand, and following them would leave no position to draw.
-- binds: none
-- index: events_position_key
SELECT setval('annals.events_position', top.position)
  FROM (SELECT max(position) AS position FROM annals.events WHERE position < (1::bigint << 62)) AS top
 WHERE top.position > (SELECT annals.drawn())
