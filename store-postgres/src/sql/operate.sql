-- Appends a group of commits of an operator, who may append only operator acts; see the function `operate`.
-- binds: $1 streams, $2 their guessed versions, $3 the ids of the events at these versions (NULL: any), $4 whether the
--        streams are only held (NULL: not even held); $5 collections, $6 ids, $7 the guessed versions of these
--        documents, $8 removed before, $9 steps, $10 bodies, $11 due; $12 ranks of the events, $13 their streams
--        (index in $1), $14 stream ids, $15 steps, $16 event ids, $17 types, $18 schema versions, $19 data, $20
--        metadata
-- returns: positions by rank (NULL: a guess was wrong, and nothing was written), versions and ids of the last events in
--          the order of $1, versions of documents in the order of $6, the time of recording
-- index: events_stream_version, documents_key; grows events_position_key
SELECT positions, stream_versions, stream_events, document_versions, recorded
  FROM annals.operate_checked($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)
