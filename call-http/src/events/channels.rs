//! Reads the log once for all clients, and hands each event to the clients that follow it.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use annals::{EventStore, LogPage, LogQuery, Position, Recorded, StoreError, StreamId, pages::PAGE};
use tokio::{
    sync::broadcast::{self, Receiver, Sender},
    task::JoinHandle,
    time::sleep,
};

use super::{line::Line, selection::Selection};

/// The delay before a failed read of the store is retried.
pub(super) const READ_AGAIN: Duration = Duration::from_millis(200);
/// The number of events that a channel holds for clients which have not taken them yet. A client that is further behind
/// reads the store.
const HELD: usize = 16;

/// The channels of all clients; clients with the same selection share a channel. Clones share the same channels.
#[derive(Clone)]
pub(super) struct Channels {
    store: Arc<dyn EventStore>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// How far the task has read the log. The task has sent each event to the channels that were open at the
    /// time of the read.
    position: Position,
    /// The channels of selections that name a stream, by that stream, so that `send` finds the channels of an event
    /// without a search.
    of_streams: HashMap<StreamId, Vec<Channel>>,
    others: Vec<Channel>,
    /// The task that reads the log. The task runs while there are clients.
    reader: Option<JoinHandle<()>>,
    /// The number of tasks started so far. A task that was replaced by another one sends nothing more.
    readers: u64,
}

struct Channel {
    selection: Selection,
    lines: Sender<Arc<Line>>,
}

/// A client's end of a channel.
pub(super) struct Listening {
    pub receiver: Receiver<Arc<Line>>,
    /// All later events of the selection come through `receiver`.
    pub position: Position,
    selection: Selection,
    channels: Channels,
}

impl fmt::Debug for Listening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listening").field("position", &self.position).finish_non_exhaustive()
    }
}

impl State {
    fn is_reading(&self) -> bool {
        self.reader.as_ref().is_some_and(|reader| !reader.is_finished())
    }

    fn listen(&mut self, selection: &Selection) -> Receiver<Arc<Line>> {
        let channels = match &selection.stream {
            Some(stream) => self.of_streams.entry(stream.clone()).or_default(),
            None => &mut self.others,
        };
        if let Some(channel) = channels.iter().find(|channel| channel.selection == *selection) {
            return channel.lines.subscribe();
        }
        let (lines, receiver) = broadcast::channel(HELD);
        channels.push(Channel { selection: selection.clone(), lines });
        receiver
    }

    /// Removes the channel of a selection unless a client still listens, and ends the task if there are no clients.
    fn leave(&mut self, selection: &Selection) {
        let is_used = |channel: &Channel| channel.lines.receiver_count() > 0;
        match &selection.stream {
            Some(stream) => {
                if let Some(channels) = self.of_streams.get_mut(stream) {
                    channels.retain(is_used);
                    if channels.is_empty() {
                        self.of_streams.remove(stream);
                    }
                }
            }
            None => self.others.retain(is_used),
        }
        if self.others.is_empty()
            && self.of_streams.is_empty()
            && let Some(reader) = self.reader.take()
        {
            reader.abort();
        }
    }

    fn send(&mut self, event: &Recorded) {
        let of_stream = self.of_streams.get(&event.stream).into_iter().flatten();
        let mut line = None;
        for channel in of_stream.chain(&self.others).filter(|channel| channel.selection.has(event)) {
            // If all clients have left, nobody misses the event.
            _ = channel.lines.send(line.get_or_insert_with(|| Line::of(event)).clone());
        }
    }
}

impl Channels {
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self { store, state: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the position up to which the task has read the log.
    pub fn position(&self) -> Position {
        self.state().position
    }

    /// Opens a channel, and starts the task that reads the log unless the task runs already.
    pub async fn listen(&self, selection: &Selection) -> Result<Listening, StoreError> {
        let is_reading = self.state().is_reading();
        let head = if is_reading { None } else { Some(self.store.status().await?.head) };
        let mut state = self.state();
        // The task starts at a position that was the end of the log before the client began to listen.
        if !state.is_reading() {
            state.position = head.unwrap_or(state.position);
            state.readers += 1;
            state.reader = Some(tokio::spawn(self.clone().read(state.readers, state.position)));
        }
        let receiver = state.listen(selection);
        Ok(Listening { receiver, position: state.position, selection: selection.clone(), channels: self.clone() })
    }

    /// Reads the log from a position on, until the last client leaves.
    async fn read(self, number: u64, mut position: Position) {
        let mut history = self.store.history();
        loop {
            match self.page(&mut history, position).await {
                Ok(page) => {
                    let mut state = self.state();
                    if state.readers != number {
                        return;
                    }
                    for event in &page.events {
                        state.send(event);
                    }
                    position = page.next;
                    state.position = position;
                }
                // Readiness probes report that the store is unavailable.
                Err(StoreError::Unavailable(_)) => sleep(READ_AGAIN).await,
                Err(error) => {
                    tracing::error!(%error, "the streams of events ended");
                    let mut state = self.state();
                    if state.readers == number {
                        state.of_streams.clear();
                        state.others.clear();
                    }
                    return;
                }
            }
        }
    }

    async fn page(&self, history: &mut u64, mut position: Position) -> Result<LogPage, StoreError> {
        if self.store.history() != *history {
            // After a restore, the log may be shorter than before.
            let now = self.store.history();
            position = position.min(self.store.status().await?.head);
            *history = now;
        }
        let page = self.store.read_log(&LogQuery::all(), position, PAGE).await?;
        if self.store.history() != *history {
            // The page may belong to another log than the position.
            return Ok(LogPage { next: position, ..LogPage::default() });
        }
        if page.next == position {
            self.store.wait(position).await?;
        }
        Ok(page)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let (_, closed) = broadcast::channel(1);
        // `leave` counts the receivers of the channel, so this client's receiver is dropped before the call.
        self.receiver = closed;
        self.channels.state().leave(&self.selection);
    }
}
