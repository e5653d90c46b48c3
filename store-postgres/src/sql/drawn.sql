-- The last position drawn by anybody, committed or not.
-- binds: none
-- index: none
SELECT annals.drawn()
