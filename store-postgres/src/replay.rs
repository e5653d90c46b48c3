//! Replay: reads the whole log, or a large part of it, in one fast pass. One task copies pages out of the database, and
//! other tasks decode the pages; the events stay in order. The number of bytes that wait between these tasks is
//! bounded.
//!
//! Each page is a separate `COPY`, so that no statement and no snapshot on the server lasts as long as the replay. If
//! the caller takes no events for a while, the page is aborted, and a new page later continues after the last event
//! that was passed on.

use std::{
    ops::{Bound, RangeBounds},
    sync::Arc,
    time::Duration,
};

use annals::{
    Event, LogQuery, Position, Recorded, StoreError, StreamId, Version,
    archive::Stored,
    event::{DecodeError, EventError},
};
use chrono::{DateTime, Datelike, Utc};
use futures::{Stream, StreamExt, TryStreamExt, stream};
use sqlx::{Connection, PgConnection};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};

use crate::{
    PostgresStore, Shared,
    copied::{COLUMNS, COLUMNS_TYPED, HEADER_BYTES, Row, Rows, position},
    error::{is_lost, read_error},
    read::{READS_MAX, bound},
};

/// The number of events that one page examines. This takes some tens of milliseconds.
const PAGE_EVENTS: usize = 20_000;
/// The maximum number of events in a batch, which one task decodes. A batch also ends with the event that reaches
/// `BATCH_BYTES`.
const BATCH_EVENTS: usize = 500;
const BATCH_BYTES: usize = 256 << 10;
/// The maximum number of batches that wait to be decoded.
const WAITING_BATCHES: usize = 4;
/// The maximum number of batches that are being decoded in parallel, or that wait for their turn to be returned.
const DECODING_BATCHES: usize = 4;
/// How long a page waits for the caller before the page is aborted, because the server must not keep a snapshot for a
/// slow caller.
const PATIENCE: Duration = Duration::from_secs(2);

/// Selects the events to replay. The default is all events.
///
/// ```
/// use annals::Position;
/// use annals_postgres::Replay;
/// let since_monday = "2026-11-16T00:00:00Z".parse::<chrono::DateTime<chrono::Utc>>()?;
/// let replay = Replay::all().categories(["order"]).recorded(since_monday..).positions(..=Position(1_000_000));
/// # Ok::<(), chrono::ParseError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Replay {
    query: LogQuery,
    after: i64,
    until: i64,
    recorded: (Bound<DateTime<Utc>>, Bound<DateTime<Utc>>),
}

impl Replay {
    /// Selects the whole log.
    pub fn all() -> Self {
        let recorded = (Bound::Unbounded, Bound::Unbounded);
        Self { query: LogQuery::all(), after: 0, until: i64::MAX, recorded }
    }

    /// Selects only events of these categories.
    pub fn categories<S: Into<Arc<str>>>(mut self, categories: impl IntoIterator<Item = S>) -> Self {
        self.query.categories = categories.into_iter().map(Into::into).collect();
        self
    }

    /// Selects only events of these types.
    pub fn types<S: Into<Arc<str>>>(mut self, types: impl IntoIterator<Item = S>) -> Self {
        self.query.types = types.into_iter().map(Into::into).collect();
        self
    }

    /// Selects only events at these positions.
    pub fn positions(mut self, positions: impl RangeBounds<Position>) -> Self {
        self.after = match positions.start_bound() {
            Bound::Included(first) => first.0.saturating_sub(1).max(0),
            Bound::Excluded(before) => before.0.max(0),
            Bound::Unbounded => 0,
        };
        self.until = match positions.end_bound() {
            Bound::Included(last) => last.0,
            Bound::Excluded(end) => end.0.saturating_sub(1),
            Bound::Unbounded => i64::MAX,
        };
        self
    }

    /// Selects only events recorded within this range of times. The replay then examines every event, because the times
    /// have no index.
    pub fn recorded(mut self, times: impl RangeBounds<DateTime<Utc>>) -> Self {
        self.recorded = (times.start_bound().cloned(), times.end_bound().cloned());
        self
    }

    /// Returns the conditions on categories, types and times, as SQL.
    fn filter(&self) -> String {
        let mut filter = String::new();
        for (column, names) in [("split_part(stream_id, '-', 1)", &self.query.categories), ("type", &self.query.types)]
        {
            if !names.is_empty() {
                // No name in the log contains a NUL, and no statement may contain one.
                let names: Vec<_> = names.iter().filter(|name| !name.contains('\0')).map(|name| quoted(name)).collect();
                filter += &format!(" AND {column} = ANY (ARRAY[{}]::text[])", names.join(", "));
            }
        }
        match self.recorded.0 {
            Bound::Included(first) => filter += &format!(" AND recorded_at >= {}", timestamp(first)),
            Bound::Excluded(before) => filter += &format!(" AND recorded_at > {}", timestamp(before)),
            Bound::Unbounded => {}
        }
        match self.recorded.1 {
            Bound::Included(last) => filter += &format!(" AND recorded_at <= {}", timestamp(last)),
            Bound::Excluded(end) => filter += &format!(" AND recorded_at < {}", timestamp(end)),
            Bound::Unbounded => {}
        }
        filter
    }
}

/// Quotes text for a statement, independent of `standard_conforming_strings`.
fn quoted(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// Formats a time for a statement. A time before the year 1 or after the year 9999 becomes an infinity, because it is
/// earlier or later than every recorded time.
fn timestamp(time: DateTime<Utc>) -> String {
    match time.year() {
        ..1 => "'-infinity'".to_owned(),
        1..=9_999 => time.format("'%Y-%m-%d %H:%M:%S%.6f+00'").to_string(),
        _ => "'infinity'".to_owned(),
    }
}

/// An event of a typed replay.
#[derive(Clone, Debug, PartialEq)]
pub struct Replayed<E> {
    /// The position in the log.
    pub position: Position,
    /// The stream.
    pub stream: StreamId,
    /// The version in the stream.
    pub version: Version,
    /// When the store recorded the event.
    pub recorded_at: DateTime<Utc>,
    /// The event.
    pub event: E,
}

/// Why a typed replay did not return an event.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The store could not be read, and the replay has ended. To continue, start a replay after the last event that was
    /// returned.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// This event cannot be decoded as the requested type. The replay continues with the next event.
    #[error(transparent)]
    Undecodable(#[from] DecodeError),
}

impl PostgresStore {
    /// Returns events in log order, up to the end that the log has when the replay starts. A replay returns the same
    /// events as [`read_log`](annals::EventStore::read_log), but faster. It takes constant memory, regardless of the
    /// length of the log and the speed of the caller. The stream ends after an error.
    ///
    /// The replay uses a connection of its own until the replay has ended or is dropped.
    pub fn replay(&self, replay: Replay) -> impl Stream<Item = Result<Recorded, StoreError>> + Send + Unpin + use<> {
        let decode = |rows: &[u8]| {
            let mut rows = Rows::new(rows);
            let mut events = Vec::with_capacity(BATCH_EVENTS);
            while let Some(row) = rows.next()? {
                events.push(rows.recorded(&row));
            }
            Ok(events)
        };
        self.decoded(replay, COLUMNS, decode).map_ok(|events| stream::iter(events).map(Ok)).try_flatten()
    }

    /// Replays the log as events of type `E`. Separate tasks decode the events. Events that `E` skips are left out.
    ///
    /// ```no_run
    /// # async fn total(store: annals_postgres::PostgresStore) -> Result<(), annals_postgres::ReplayError> {
    /// use annals::Event;
    /// use annals_postgres::Replay;
    /// use futures::TryStreamExt;
    ///
    /// #[derive(Event)]
    /// #[event(prefix = "order", unknown = "skip")]
    /// enum OrderEvent {
    ///     Placed { total: u64 },
    /// }
    ///
    /// let mut total = 0;
    /// let mut orders = store.replay_as::<OrderEvent>(Replay::all().categories(["order"]));
    /// while let Some(order) = orders.try_next().await? {
    ///     let OrderEvent::Placed { total: of_order } = order.event;
    ///     total += of_order;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn replay_as<E: Event>(
        &self,
        replay: Replay,
    ) -> impl Stream<Item = Result<Replayed<E>, ReplayError>> + Send + Unpin + use<E> {
        let decode = |rows: &[u8]| {
            let mut rows = Rows::new(rows);
            let mut events = Vec::with_capacity(BATCH_EVENTS);
            while let Some(row) = rows.next()? {
                match E::decode(row.type_name, row.schema_version, row.data) {
                    Ok(Some(event)) => events.push(Ok(replayed(&row, event))),
                    Ok(None) => {}
                    Err(error) => events.push(Err(ReplayError::from(undecodable(&row, error)))),
                }
            }
            Ok(events)
        };
        let decoded = self.decoded(replay, COLUMNS_TYPED, decode);
        decoded.map_err(ReplayError::from).map_ok(stream::iter).try_flatten()
    }

    /// Replays events byte for byte, in batches. For each batch, the stream returns the value that `take` has
    /// accumulated from the events of the batch. Several tasks run `take` in parallel, each on its own batch.
    ///
    /// ```no_run
    /// # async fn bytes(store: annals_postgres::PostgresStore) -> Result<(), annals::StoreError> {
    /// use annals_postgres::Replay;
    /// use futures::TryStreamExt;
    ///
    /// let batches = store.replay_stored(Replay::all(), |bytes: &mut u64, event| *bytes += event.data.len() as u64);
    /// let of_all_payloads = batches.try_fold(0, async |total, bytes| Ok(total + bytes)).await?;
    /// # let _ = of_all_payloads;
    /// # Ok(())
    /// # }
    /// ```
    pub fn replay_stored<B, F>(
        &self,
        replay: Replay,
        take: F,
    ) -> impl Stream<Item = Result<B, StoreError>> + Send + Unpin + use<B, F>
    where
        B: Default + Send + 'static,
        F: Fn(&mut B, Stored<'_>) + Send + Sync + 'static,
    {
        let take = Arc::new(take);
        self.decoded(replay, COLUMNS, move |rows: &[u8]| {
            let mut rows = Rows::new(rows);
            let mut batch = B::default();
            while let Some(row) = rows.next()? {
                take(&mut batch, row.stored());
            }
            Ok(batch)
        })
    }

    fn decoded<T: Send + 'static, F>(
        &self,
        replay: Replay,
        columns: &'static str,
        decode: F,
    ) -> impl Stream<Item = Result<T, StoreError>> + Send + Unpin + use<T, F>
    where
        F: Fn(&[u8]) -> Result<T, StoreError> + Clone + Send + 'static,
    {
        let (batches, waiting) = mpsc::channel(WAITING_BATCHES);
        let copier = Copier {
            shared: self.shared.clone(),
            statement: self.shared.database.statements.replay.as_str().replace("{columns}", columns),
            filter: replay.filter(),
            last: replay.after,
            batch: Vec::new(),
            events: 0,
            batches,
        };
        // If the stream is dropped, the task and its connection are dropped too.
        let mut task = JoinSet::new();
        let mut start = Some((copier, replay.until));
        let batches = stream::unfold(waiting, move |mut waiting| {
            // The replay starts with the first poll.
            if let Some((copier, until)) = start.take() {
                task.spawn(copier.run(until));
            }
            let _owned = &task;
            async move { waiting.recv().await.map(|batch| (batch, waiting)) }
        });
        let decoding = batches.map(move |batch| {
            let decode = decode.clone();
            async move {
                let decoded = tokio::spawn(async move { batch.and_then(|rows: Vec<u8>| decode(&rows)) });
                decoded
                    .await
                    .unwrap_or_else(|error| Err(StoreError::Corrupt(format!("an event could not be decoded: {error}"))))
            }
        });
        let mut failed = false;
        let until_an_error = decoding.buffered(DECODING_BATCHES).take_while(move |batch| {
            let goes_on = !failed;
            failed |= batch.is_err();
            std::future::ready(goes_on)
        });
        Box::pin(until_an_error)
    }
}

fn replayed<E>(row: &Row<'_>, event: E) -> Replayed<E> {
    let position = row.position;
    let stream = row.stream();
    let version = row.version;
    Replayed { position, stream, version, recorded_at: row.recorded_at(), event }
}

fn undecodable(row: &Row<'_>, source: EventError) -> DecodeError {
    DecodeError { stream: row.stream(), version: row.version, position: row.position, source }
}

/// The task that reads the log, one page after another, and sends batches to the decoding tasks.
struct Copier {
    shared: Arc<Shared>,
    statement: String,
    filter: String,
    /// The position up to which all events are in batches.
    last: i64,
    batch: Vec<u8>,
    events: usize,
    batches: mpsc::Sender<Result<Vec<u8>, StoreError>>,
}

/// How a page ended.
enum Page {
    /// There are no events after this page.
    Last,
    /// The page was copied completely; more events may follow.
    Whole,
    /// The page was aborted, because the caller took no batch for a while.
    BrokenOff,
    /// The page was aborted, because the caller is gone.
    Abandoned,
}

impl Copier {
    async fn run(mut self, until: i64) {
        let outcome = self.copy(until).await;
        let last = match outcome {
            Ok(()) if self.batch.is_empty() => return,
            Ok(()) => Ok(self.batch),
            Err(error) => Err(error),
        };
        // An error means that the caller is gone, and does not matter.
        self.batches.send(last).await.ok();
    }

    async fn copy(&mut self, until: i64) -> Result<(), StoreError> {
        let history = self.shared.database.history.number();
        let until = until.min(self.shared.log.status().await?.head.0);
        let mut connection = None::<PgConnection>;
        let mut failures = 0;
        while self.last < until {
            let before = self.last;
            let page = async {
                let open = match connection.take() {
                    Some(open) => open,
                    None => self.shared.readers.get().await?.detach().ok_or(sqlx::Error::PoolClosed)?,
                };
                self.page(open, &mut connection, until).await
            };
            let page = page.await;
            if self.shared.database.history.number() != history {
                // The end position of this replay belongs to the earlier log, and has no meaning in the new log.
                let reason = "the log changed (failover or restore) during the replay: start it again";
                return Err(StoreError::Unavailable(reason.into()));
            }
            match page {
                Ok(Page::Last | Page::Abandoned) => break,
                Ok(Page::Whole) => failures = 0,
                Ok(Page::BrokenOff) => {
                    failures = 0;
                    // After an aborted page, waits until there is room for the current batch.
                    if !self.send(None).await {
                        break;
                    }
                }
                Err(error) => {
                    failures = if self.last > before { 1 } else { failures + 1 };
                    if failures >= READS_MAX || !is_lost(&error) {
                        return Err(read_error(error));
                    }
                }
            }
        }
        if let Some(open) = connection {
            // All pages on this connection are complete, so an error does not matter.
            open.close().await.ok();
        }
        Ok(())
    }

    /// Copies one page. Puts the connection back into `connection` only if no statement is in flight on it.
    async fn page(
        &mut self,
        mut open: PgConnection,
        connection: &mut Option<PgConnection>,
        until: i64,
    ) -> Result<Page, sqlx::Error> {
        let mut page_until = until;
        if !self.filter.is_empty() {
            // Rows that the filter leaves out are not sent, so the rows alone do not show where the page ended.
            let end: Option<i64> = self
                .shared
                .database
                .statements
                .settled_until
                .scalar()
                .bind(self.last)
                .bind(until)
                .bind(bound(PAGE_EVENTS))
                .fetch_one(&mut open)
                .await?;
            match end {
                Some(end) => page_until = end,
                None => return Ok(Page::Last),
            }
        }
        let statement = self
            .statement
            .replace("{after}", &self.last.to_string())
            .replace("{until}", &page_until.to_string())
            .replace("{limit}", &PAGE_EVENTS.to_string())
            .replace("{filter}", &self.filter);
        let mut copied = open.copy_out_raw(&statement).await?;
        let mut events = 0;
        let mut header = HEADER_BYTES;
        // Each message contains one row. The header precedes the first row, and the last message is a trailer.
        while let Some(message) = copied.try_next().await? {
            let row = &message[std::mem::take(&mut header).min(message.len())..];
            let Some(position) = position(row) else { continue };
            self.batch.extend_from_slice(row);
            self.last = position;
            self.events += 1;
            events += 1;
            if (self.events >= BATCH_EVENTS || self.batch.len() >= BATCH_BYTES) && !self.send(Some(PATIENCE)).await {
                let abandoned = self.batches.is_closed();
                return Ok(if abandoned { Page::Abandoned } else { Page::BrokenOff });
            }
        }
        drop(copied);
        *connection = Some(open);
        if !self.filter.is_empty() {
            self.last = page_until;
        }
        Ok(if self.filter.is_empty() && events < PAGE_EVENTS { Page::Last } else { Page::Whole })
    }

    /// Sends the batch. Returns `false` if the caller does not take the batch in time, or is gone.
    async fn send(&mut self, patience: Option<Duration>) -> bool {
        let place = match patience {
            Some(patience) => timeout(patience, self.batches.reserve()).await,
            None => Ok(self.batches.reserve().await),
        };
        let Ok(Ok(place)) = place else { return false };
        self.events = 0;
        place.send(Ok(std::mem::take(&mut self.batch)));
        true
    }
}
