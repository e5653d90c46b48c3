//! Reads single streams. Reads that wait for a session share the next free session and one statement, so that under
//! load many aggregates are loaded in one round trip.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use annals::{Recorded, StoreError, StreamId, Version};
use sqlx::{Row, postgres::PgRow};
use tokio::sync::oneshot;

use crate::{
    error::{is_lost, read_error},
    read::{READS_MAX, bound, recorded},
    readers::{Reader, Readers},
    statements::Statements,
};

/// The maximum number of streams that one statement reads.
const STREAMS_MAX: usize = 64;

/// The lowest position that counts as written by hand; `advance` also ignores such positions.
const BY_HAND: i64 = 1 << 62;

type StreamRead = Result<Vec<Recorded>, StoreError>;

/// The reads that wait for a session.
#[derive(Debug, Default)]
pub(crate) struct Streams(Mutex<VecDeque<Wanted>>);

#[derive(Debug)]
struct Wanted {
    stream: StreamId,
    after: Version,
    limit: usize,
    answer: oneshot::Sender<StreamRead>,
}

impl Streams {
    pub(crate) async fn read(
        &self,
        (readers, statements): (&Readers, &Statements),
        stream: &StreamId,
        after: Version,
        limit: usize,
    ) -> StreamRead {
        loop {
            // The guard is declared before the receiver, so that the receiver is dropped first.
            let mut place = Place { streams: self, answered: false };
            let (answer, mut answered) = oneshot::channel();
            self.waiting().push_back(Wanted { stream: stream.clone(), after, limit, answer });
            // Many reads are often about to start at once, for example when a whole batch has just been answered.
            // Without this yield, each of the first reads would take a session for a single stream.
            tokio::task::yield_now().await;
            let outcome = loop {
                // The number of the history is read before the session is opened. The session may therefore read a
                // later history than this number says, but never an earlier one.
                let of = readers.history().number();
                let reader = tokio::select! {
                    biased;
                    outcome = &mut answered => break outcome,
                    reader = readers.get() => reader.map_err(read_error)?,
                };
                // The next batch contains this read, unless another task has already taken the read.
                let batch = self.next_batch();
                if batch.is_empty() {
                    drop(reader);
                    break (&mut answered).await;
                }
                serve(batch, of, reader, (readers, statements)).await;
            };
            place.answered = true;
            // If there is no outcome, the task that had taken this read was cancelled, and the read starts again.
            if let Ok(outcome) = outcome {
                return outcome;
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Wanted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_batch(&self) -> Vec<Wanted> {
        let mut waiting = self.waiting();
        let count = waiting.len().min(STREAMS_MAX);
        waiting.drain(..count).collect()
    }
}

/// A guard that removes a cancelled read from the queue.
struct Place<'s> {
    streams: &'s Streams,
    answered: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.streams.waiting().retain(|wanted| !wanted.answer.is_closed());
        }
    }
}

/// Reads for the whole batch, and answers each read.
async fn serve(batch: Vec<Wanted>, of: u64, mut reader: Reader, (readers, statements): (&Readers, &Statements)) {
    let mut reads = 1;
    let history = readers.history();
    let rows = loop {
        match fetch(&batch, &mut reader, statements).await {
            Err(error) if reads < READS_MAX && is_lost(&error) => {
                reads += 1;
                reader.give_up();
                drop(reader);
                match readers.get().await {
                    Ok(another) => reader = another,
                    Err(error) => break Err(error),
                }
            }
            outcome => break outcome,
        }
    };
    let rows = match rows {
        Ok(rows) => rows,
        Err(error) => {
            let error = read_error(error);
            // A cancelled read needs no answer.
            return batch.into_iter().for_each(|wanted| _ = wanted.answer.send(Err(error.clone())));
        }
    };
    let alone = batch.len() == 1;
    let mut rows = rows.iter().peekable();
    for (wanted, number) in batch.into_iter().zip(1_i64..) {
        let is_of_it = |row: &&PgRow| alone || row.try_get::<i64, _>(9).is_ok_and(|n| n == number);
        let mut events = Vec::new();
        while let Some(row) = rows.next_if(is_of_it) {
            events.push(recorded(row));
        }
        let events = events.into_iter().collect::<Result<Vec<_>, _>>().map_err(read_error);
        let last = events.as_ref().ok().and_then(|events| events.last());
        // A row inserted by hand with a huge position is not the end of the log.
        if let Some(last) = last.filter(|last| last.position.0 < BY_HAND) {
            history.saw(of, (last.position.0, last.id));
        }
        _ = wanted.answer.send(events);
    }
}

async fn fetch(batch: &[Wanted], reader: &mut Reader, statements: &Statements) -> Result<Vec<PgRow>, sqlx::Error> {
    let query = match batch {
        [Wanted { stream, after, limit, .. }] => {
            statements.read_stream.query().bind(stream.as_str()).bind(after.0).bind(bound(*limit))
        }
        several => statements
            .read_streams
            .query()
            .bind(several.iter().map(|wanted| wanted.stream.as_str()).collect::<Vec<_>>())
            .bind(several.iter().map(|wanted| wanted.after.0).collect::<Vec<_>>())
            .bind(several.iter().map(|wanted| bound(wanted.limit)).collect::<Vec<_>>()),
    };
    query.fetch_all(reader.connection()?).await
}
