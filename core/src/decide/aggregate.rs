//! The aggregate: two pure functions, `decide` and `evolve`, without a clock, I/O or services.

use crate::{base::json::to_json_exact, event::Event};

/// An aggregate, which decides on commands and folds events into its state.
///
/// Both functions are pure. If `decide` returns no events, the command has nothing left to do. The state is rebuilt by
/// folding the events of the stream, so `Default` must return the state before the first event. `Clone` lets many
/// readers share one folded state, and lets the framework discard a changed copy when its commit loses a race.
pub trait Aggregate: Default + Clone + Send + Sync + 'static {
    /// The category of all aggregates of this type. The category is the first part of their stream ids. The category is
    /// stored: never rename it.
    const CATEGORY: &'static str;
    /// How often a snapshot of the folded state is stored; `None` stores no snapshots. See [`Snapshot`].
    const SNAPSHOT: Option<Snapshot<Self>> = None;
    /// The commands that the aggregate decides on.
    type Command: Send + Sync + 'static;
    /// The events of the aggregate.
    type Event: Event;
    /// Why the aggregate refuses a command.
    type Refusal: std::error::Error + Send + Sync + 'static;

    /// Returns the events that `command` causes in the current state, or why the command is refused.
    fn decide(&self, command: &Self::Command) -> Result<Vec<Self::Event>, Self::Refusal>;
    /// Applies `event` to the state.
    fn evolve(&mut self, event: &Self::Event);
}

/// When and how an aggregate's folded state is stored as a document next to its stream.
///
/// A snapshot only saves time. A snapshot is ignored if it has another `version` or does not parse. The stream is then
/// folded from its first event.
pub struct Snapshot<A> {
    /// The number of events between two snapshots.
    pub every: i64,
    /// The version of the state's format. Raise this version when the format changes.
    pub version: i32,
    /// Serializes the state as JSON. On an error, no snapshot is stored.
    pub save: fn(&A) -> Result<String, serde_json::Error>,
    /// Parses the state from JSON.
    pub load: fn(&str) -> Result<A, serde_json::Error>,
}

impl<A: serde::Serialize + serde::de::DeserializeOwned> Snapshot<A> {
    /// Stores a snapshot every `every` events, and uses the serde implementation of the state.
    pub const fn every(every: i64, version: i32) -> Self {
        Self { every, version, save: |state| to_json_exact(state), load: |text| serde_json::from_str(text) }
    }
}
