-- A group of commits of an operator, who may append nothing but acts; see the function.
-- binds: $1 streams, $2 where they are guessed to stand, $3 whether they are only held (NULL: not even that); $4 collections,
--        $5 ids, $6 where these documents are guessed to stand, $7 removed before, $8 steps, $9 bodies, $10 due; $11 ranks of
--        the events, $12 their streams (index in $1), $13 stream ids, $14 steps, $15 event ids, $16 types, $17 schema
--        versions, $18 data, $19 metadata
-- gives: positions by rank (NULL: a guess was wrong, and nothing was written), versions in the order of $1, of $4, when the
--        events were recorded
-- index: events_stream_version, documents_key; grows events_position_key
SELECT positions, stream_versions, document_versions, recorded
  FROM annals.operate($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)
