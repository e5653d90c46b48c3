//! The unit of decision: pure `decide` and `evolve`, no clock, no I/O, no services.

use crate::{event::Event, json::to_json_exact};

/// Decides on commands and evolves by events.
///
/// Both functions are pure. `decide` returning no events means that the work is already done. State is rebuilt by folding
/// the stream's events, so `Default` is the state before the first of them; `Clone` lets one folded state serve many
/// readers and be thrown away when a commit loses its race.
pub trait Aggregate: Default + Clone + Send + Sync + 'static {
    /// The first part of the stream id of every such aggregate. Stored: never rename.
    const CATEGORY: &'static str;
    /// A snapshot of the folded state is stored each so many events; `None` keeps none. See [`Snapshot`].
    const SNAPSHOT: Option<Snapshot<Self>> = None;
    /// What can be asked of it.
    type Command: Send + Sync + 'static;
    /// What can have happened to it.
    type Event: Event;
    /// Why it may say no.
    type Refusal: std::error::Error + Send + Sync + 'static;

    /// What happens if `command` is carried out now, or why it is refused.
    fn decide(&self, command: &Self::Command) -> Result<Vec<Self::Event>, Self::Refusal>;
    /// The state after `event`.
    fn evolve(&mut self, event: &Self::Event);
}

/// When and how an aggregate's folded state is stored as a document beside its stream.
///
/// A snapshot is only ever a shortcut: one of another `version`, or one that does not read, is passed over and the
/// stream is folded from its first event.
pub struct Snapshot<A> {
    /// How many events may come before the next snapshot is taken.
    pub every: i64,
    /// Raise it when the shape of the state changes.
    pub version: i32,
    /// Writes the state as JSON. An error stores no snapshot.
    pub save: fn(&A) -> Result<String, serde_json::Error>,
    /// Reads the state from JSON.
    pub load: fn(&str) -> Result<A, serde_json::Error>,
}

impl<A: serde::Serialize + serde::de::DeserializeOwned> Snapshot<A> {
    /// A snapshot each `every` events, by the state's own serde implementation.
    pub const fn every(every: i64, version: i32) -> Self {
        Self { every, version, save: |state| to_json_exact(state), load: |text| serde_json::from_str(text) }
    }
}
