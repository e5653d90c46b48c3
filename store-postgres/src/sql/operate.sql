-- Appends a group of commits for an operator, who may append only the events of operator actions; see the function
-- `operate`.
-- - binds of streams: $1 ids, $2 guessed versions, $3 ids of the events at these versions (NULL: any event), $4 whether
--   the group locks the stream without writing to it (NULL: no lock)
-- - binds of documents: $5 collections, $6 ids, $7 guessed versions, $8 whether the group removes the document first,
--   $9 steps (differences from the guessed versions), $10 bodies, $11 due times
-- - binds of events: $12 ranks in the group, $13 indexes in $1, $14 stream ids, $15 steps (differences from the guessed
--   versions), $16 event ids, $17 types, $18 schema versions, $19 data, $20 metadata
-- - returns: the positions by rank (NULL if a guess was wrong; nothing was written then), the versions and the last
--   event ids of the streams in the order of $1, the versions of the documents in the order of $6, the time of
--   recording
-- - indexes used: events_stream_version, documents_key; adds entries to events_position_key
SELECT positions, stream_versions, stream_events, document_versions, recorded
  FROM annals.operate_checked($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)
