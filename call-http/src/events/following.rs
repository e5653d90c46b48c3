//! A client's place in the log: reads the store until the client has caught up, and then takes events as they are
//! recorded.

use std::{fmt, sync::Arc, time::Duration};

use annals::{EventStore, LostEnd, Position, StoreError, Version, store::end_before};
use axum::http::{HeaderMap, StatusCode};
use tokio::{
    sync::{
        OwnedSemaphorePermit, Semaphore,
        broadcast::error::{RecvError, TryRecvError},
    },
    time::{Interval, MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{
    channels::{Channels, Listening, READ_AGAIN},
    line::Line,
    selection::{self, Parameters, Selection},
};
use crate::problem::{Problem, without_files};

/// The maximum number of clients that follow events at the same time. Further clients get a 503.
pub const STREAMS_MAX: usize = 10_000;
/// A client that accepts nothing for this long is dropped.
pub const SLOW_CLIENT: Duration = Duration::from_secs(10);
/// The interval between messages to a client if there are no events for the client. Each message also says how far the
/// client has read the log, so that a client that comes back does not read the same part of the log again.
pub const HEARTBEAT: Duration = Duration::from_secs(15);
/// The maximum number of events that are read from the store, or sent to a client, in one piece.
pub(super) const PIECE: usize = 32;
/// A piece ends once it has this many bytes.
const PIECE_BYTES: usize = 8_000;

/// The header with the position of the last event that a reconnecting client has received.
const LAST_EVENT_ID: &str = "last-event-id";

/// What a client gets next.
#[derive(Debug)]
pub(super) enum Piece {
    Events(Vec<Arc<Line>>),
    /// There is no new event. The client has received all of its events up to this position.
    Nothing(Position),
    /// The stream ends, for this reason.
    End(&'static str),
}

/// Reasons for the end of a stream.
pub(super) const LOG_CHANGED: &str =
    "the log has lost events, so positions have another meaning now; start again without a position";
pub(super) const STOPPING: &str = "the server stops; connect again and continue after the last position";
const UNREADABLE: &str = "the store cannot serve these events; see the process log of the service";
pub(super) const SLOW: &str =
    "the client did not accept events for 10 s; connect again and continue after the last position";

#[derive(Clone)]
pub(super) struct Streams {
    store: Arc<dyn EventStore>,
    channels: Channels,
    places: Arc<Semaphore>,
    ended: CancellationToken,
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams").finish_non_exhaustive()
    }
}

impl Streams {
    pub fn new(store: Arc<dyn EventStore>, ended: CancellationToken) -> Self {
        let places = Arc::new(Semaphore::new(STREAMS_MAX));
        Self { channels: Channels::new(store.clone()), store, places, ended }
    }

    /// Starts a stream for a client.
    pub async fn follow(&self, parameters: &Parameters, headers: &HeaderMap) -> Result<Following, Problem> {
        let (selection, after) = selection::read(parameters)?;
        let after = last_event_id(headers)?.or(after);
        let place = self.places.clone().try_acquire_owned();
        let place = place.map_err(|_| Problem::unavailable(format!("{STREAMS_MAX} clients follow events already")))?;
        let history = self.store.history();
        let status = self.store.status().await.map_err(|error| problem(&error))?;
        let at = match after {
            None => status.head,
            Some(at) => match end_before(&*self.store, &status, at).await.map_err(|error| problem(&error))? {
                None => at,
                Some(end) => {
                    let detail =
                        format!("position {at} is beyond the end of the log, which is at {end}; is this another log?");
                    return Err(Problem::new(StatusCode::CONFLICT, detail));
                }
            },
        };
        let live = self.channels.listen(&selection).await.map_err(|error| problem(&error))?;
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeat.reset();
        let until = live.position;
        let known_loss = status.lost_end;
        let streams = self.clone();
        Ok(Following {
            streams,
            selection,
            known: Version::START,
            at,
            until,
            history,
            known_loss,
            live,
            heartbeat,
            _place: place,
        })
    }
}

/// A client's place in the log.
#[derive(Debug)]
pub(super) struct Following {
    streams: Streams,
    selection: Selection,
    /// A version of the selected stream. The events up to this version are not after `at`, so reads of the stream start
    /// after this version.
    known: Version,
    /// The client has received all events up to this position.
    at: Position,
    /// The events after this position come through `live`, and the events up to this position are read from the store.
    until: Position,
    history: u64,
    /// The loss that was known when the client came; its position already belongs to the log after this loss.
    known_loss: Option<LostEnd>,
    live: Listening,
    heartbeat: Interval,
    _place: OwnedSemaphorePermit,
}

impl Following {
    /// Returns the token that is cancelled when all streams end.
    pub fn ended(&self) -> CancellationToken {
        self.streams.ended.clone()
    }

    /// The client has received all events up to this position.
    pub fn position(&self) -> Position {
        self.at
    }

    /// Returns what the client gets next; at most `limit` events. Nothing is lost if the future is dropped.
    pub async fn next(&mut self, limit: usize) -> Piece {
        let limit = limit.min(PIECE);
        let ended = self.ended();
        loop {
            let piece = tokio::select! {
                biased;
                () = ended.cancelled() => return Piece::End(STOPPING),
                piece = self.step(limit) => piece,
            };
            match piece {
                Some(Piece::Events(lines)) if lines.is_empty() => {}
                Some(piece) => {
                    self.heartbeat.reset();
                    return piece;
                }
                None => {}
            }
        }
    }

    /// Takes one step. Returns `None` if it is still unknown what the client gets next.
    async fn step(&mut self, limit: usize) -> Option<Piece> {
        let history = self.streams.store.history();
        if history != self.history {
            match self.streams.store.status().await {
                Ok(status) if status.lost_end != self.known_loss => return Some(Piece::End(LOG_CHANGED)),
                Ok(_) => self.history = history,
                Err(_) => sleep(READ_AGAIN).await,
            }
            return None;
        }
        if self.at < self.until { self.read(limit).await } else { self.listen(limit).await }
    }

    /// Reads the next page from the store.
    async fn read(&mut self, limit: usize) -> Option<Piece> {
        let page = tokio::select! {
            page = self.selection.page(&*self.streams.store, &mut self.known, self.at, self.until, limit) => page,
            _ = self.heartbeat.tick() => return Some(Piece::Nothing(self.at)),
        };
        let (events, next) = match page {
            Ok(page) => page,
            Err(StoreError::Unavailable(_)) => {
                // Readiness probes report that the store is unavailable.
                sleep(READ_AGAIN).await;
                return None;
            }
            Err(error) => {
                tracing::error!(%error, "a stream of events ended");
                return Some(Piece::End(UNREADABLE));
            }
        };
        // A page of another log says nothing about this one.
        if self.streams.store.history() != self.history {
            return None;
        }
        if next == self.at {
            // The store does not show yet what another reader has seen already.
            sleep(READ_AGAIN).await;
            return None;
        }
        let mut lines = Vec::with_capacity(events.len());
        let mut bytes = 0;
        for event in &events {
            if bytes > PIECE_BYTES {
                break;
            }
            let line = Line::of(event);
            bytes += line.json.len();
            lines.push(line);
        }
        self.at = match lines.last() {
            Some(last) if lines.len() < events.len() => last.position,
            _ => next,
        };
        Some(Piece::Events(lines))
    }

    /// Waits for the next events.
    async fn listen(&mut self, limit: usize) -> Option<Piece> {
        let first = tokio::select! {
            line = self.live.receiver.recv() => line,
            _ = self.heartbeat.tick() => {
                // Every event up to this position has been sent to the channel of this client.
                let sent = self.streams.channels.position();
                if self.live.receiver.is_empty() {
                    self.at = self.at.max(sent);
                }
                return Some(Piece::Nothing(self.at));
            }
        };
        let mut line = match first {
            Ok(line) => line,
            Err(RecvError::Lagged(_)) => {
                self.until = self.streams.channels.position();
                return None;
            }
            Err(RecvError::Closed) => return Some(Piece::End(UNREADABLE)),
        };
        if self.streams.store.history() != self.history {
            // The event is read again if the log has lost nothing.
            self.until = self.streams.channels.position();
            return None;
        }
        let mut lines = Vec::new();
        let mut bytes = 0;
        loop {
            if line.position > self.at {
                self.at = line.position;
                bytes += line.json.len();
                lines.push(line);
            }
            if lines.len() >= limit || bytes > PIECE_BYTES {
                break;
            }
            match self.live.receiver.try_recv() {
                Ok(next) => line = next,
                // The channel reports only once that the client has missed events.
                Err(TryRecvError::Lagged(_)) => {
                    self.until = self.streams.channels.position();
                    break;
                }
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
        Some(Piece::Events(lines))
    }
}

fn last_event_id(headers: &HeaderMap) -> Result<Option<Position>, Problem> {
    let Some(value) = headers.get(LAST_EVENT_ID) else { return Ok(None) };
    let text = value.to_str().unwrap_or("?");
    selection::position("Last-Event-ID", text).map(Some)
}

fn problem(error: &StoreError) -> Problem {
    Problem::unavailable(without_files(error))
}
