//! Tests for what is built on Annals, without a store or a bus: given/when/then for aggregates, a model checker for sagas.
//!
//! | file | what is there |
//! |---|---|
//! | `specification` | [`given`] events, when a command, then events or a refusal |
//! | `check` | [`check`]s one saga: its switches, its world, its invariants, what comes out |
//! | `model` | the state space: saga, barriers, messages in flight, world, and every move between them |
//! | `machine` | the saga in it: the real transition, each move written as JSON, read back and folded |
//! | `rules` | what must hold for every saga |
//! | `history` | a path through the state space, told in numbered lines |
//!
//! ```
//! use annals::{Aggregate, Event, testing::given};
//!
//! #[derive(Event, Clone, Debug, PartialEq)]
//! #[event(prefix = "door")]
//! enum DoorEvent { Opened {}, Closed {} }
//!
//! #[derive(Clone, Default)]
//! struct Door { open: bool }
//!
//! #[derive(Debug, PartialEq, thiserror::Error)]
//! #[error("the door is closed already")]
//! struct ClosedAlready;
//!
//! impl Aggregate for Door {
//!     const CATEGORY: &'static str = "door";
//!     type Command = bool;
//!     type Event = DoorEvent;
//!     type Refusal = ClosedAlready;
//!     fn decide(&self, open: &bool) -> Result<Vec<DoorEvent>, ClosedAlready> {
//!         match (self.open, open) {
//!             (false, true) => Ok(vec![DoorEvent::Opened {}]),
//!             (true, false) => Ok(vec![DoorEvent::Closed {}]),
//!             (true, true) => Ok(vec![]),
//!             (false, false) => Err(ClosedAlready),
//!         }
//!     }
//!     fn evolve(&mut self, event: &DoorEvent) {
//!         self.open = *event == DoorEvent::Opened {};
//!     }
//! }
//!
//! given::<Door>([]).when(true).then([DoorEvent::Opened {}]);
//! given::<Door>([DoorEvent::Opened {}]).when(true).nothing();
//! given::<Door>([]).when(false).refused(ClosedAlready);
//! ```

mod check;
mod history;
mod machine;
mod model;
mod rules;
mod specification;

pub use check::{ATTEMPTS, Check, Report, STATES_MAX, Violation, check};
pub use specification::{Given, When, given};
