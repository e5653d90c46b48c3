-- A group of commits; see the function.
-- binds: $1 streams, $2 where they are guessed to stand; $3 collections, $4 ids, $5 where these documents are guessed to stand,
--        $6 removed before, $7 steps, $8 bodies, $9 due; $10 ranks of the events, $11 their streams (index in $1), $12 stream
--        ids, $13 steps, $14 event ids, $15 types, $16 schema versions, $17 data, $18 metadata
-- gives: positions by rank (NULL: a guess was wrong, and nothing was written), versions in the order of $1, of $3, when the
--        events were recorded
-- index: events_stream_version, documents_key; grows events_position_key
SELECT positions, stream_versions, document_versions, recorded
  FROM annals.append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)
