//! The aggregate: two pure functions, `decide` and `evolve`, without a clock, I/O or services.

use crate::{base::json::to_json_exact, event::Event};

/// An aggregate. It decides on commands, and folds events into its state.
///
/// `decide` and `evolve` are pure. If `decide` returns no events, the command has nothing left to do. The state is
/// rebuilt by folding the events of the stream, so `Default` must return the state before the first event. `Clone` lets
/// many readers share one folded state, and lets the framework discard a changed copy when its commit loses a race.
///
/// ```
/// use annals::{Aggregate, Event};
///
/// #[derive(Event, Clone, Debug, PartialEq)]
/// #[event(prefix = "seat")]
/// enum SeatEvent {
///     Booked { guest: String },
///     Freed {},
/// }
///
/// enum SeatCommand {
///     Book { guest: String },
///     Free,
/// }
///
/// #[derive(Debug, PartialEq, thiserror::Error)]
/// #[error("the seat is booked by {0}")]
/// struct Booked(String);
///
/// #[derive(Clone, Default)]
/// struct Seat {
///     guest: Option<String>,
/// }
///
/// impl Aggregate for Seat {
///     const CATEGORY: &'static str = "seat";
///     type Command = SeatCommand;
///     type Event = SeatEvent;
///     type Refusal = Booked;
///
///     fn decide(&self, command: &SeatCommand) -> Result<Vec<SeatEvent>, Booked> {
///         match (command, &self.guest) {
///             (SeatCommand::Book { guest }, None) => Ok(vec![SeatEvent::Booked { guest: guest.clone() }]),
///             (SeatCommand::Book { .. }, Some(guest)) => Err(Booked(guest.clone())),
///             (SeatCommand::Free, Some(_)) => Ok(vec![SeatEvent::Freed {}]),
///             (SeatCommand::Free, None) => Ok(vec![]),
///         }
///     }
///
///     fn evolve(&mut self, event: &SeatEvent) {
///         match event {
///             SeatEvent::Booked { guest } => self.guest = Some(guest.clone()),
///             SeatEvent::Freed {} => self.guest = None,
///         }
///     }
/// }
///
/// let mut seat = Seat::default();
/// let events = seat.decide(&SeatCommand::Book { guest: "Ada".into() })?;
/// assert_eq!(events, [SeatEvent::Booked { guest: "Ada".into() }]);
/// seat.evolve(&events[0]);
/// assert_eq!(seat.decide(&SeatCommand::Book { guest: "Bo".into() }), Err(Booked("Ada".into())));
/// # Ok::<(), Booked>(())
/// ```
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

debug_fields!([A] Snapshot<A> { every, version });

impl<A: serde::Serialize + serde::de::DeserializeOwned> Snapshot<A> {
    /// Returns settings that take a snapshot after every `every` events and use serde to write and read the state.
    pub const fn every(every: i64, version: i32) -> Self {
        Self { every, version, save: |state| to_json_exact(state), load: |text| serde_json::from_str(text) }
    }
}
