-- A page of a replay. COPY takes no binds: what stands in braces is written into the text.
-- in place: {columns}, {after} this position, up to {until}, {filter} conditions more, {limit}
-- index: events_position_key
COPY (SELECT {columns}
        FROM annals.events
       WHERE position > {after} AND position <= {until}{filter}
       ORDER BY position
       LIMIT {limit})
  TO STDOUT (FORMAT binary)
