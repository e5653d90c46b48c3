-- A page of a replay. COPY takes no binds, so the names in braces are replaced in the text.
-- - placeholders: columns, after (the position after which to start), until (the last position to read), filter
--   (further conditions), limit
-- - indexes used: events_position_key
COPY (SELECT {columns}
        FROM annals.events
       WHERE position > {after} AND position <= {until}{filter}
       ORDER BY position
       LIMIT {limit})
  TO STDOUT (FORMAT binary)
