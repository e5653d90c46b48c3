//! Tools for testing code that is built on Annals, without a store or a bus: given/when/then tests for aggregates, and
//! a model checker for sagas.
//!
//! | file | contents |
//! |---|---|
//! | `specification` | tests of one decision: [`given`] some events, a command leads to other events or to a refusal |
//! | `check` | [`check`] explores one saga; the test chooses the faults, the simulated world and the invariants |
//! | `model` | the state space: saga, barriers, messages in flight and simulated world, and every move between states |
//! | `machine` | the saga in the model: moves with the real transition function, and reads each event back from JSON |
//! | `rules` | the rules that every saga must satisfy |
//! | `history` | a path through the state space, as numbered lines |
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

//!
//! A test moves the clock by hand, so that a deadline of three days passes in a moment.
//!
//! ```
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! use std::{convert::Infallible, sync::Arc, time::Duration};
//!
//! use annals::{
//!     Aggregate, Clock, Event, EventStore, HandlerError, LocalBus, LogQuery, MemoryStore, Message, Repository, Runtime, Saga,
//!     SagaState, Service,
//!     saga::{Runner, Status, StepRequest},
//! };
//! use serde::{Deserialize, Serialize};
//! use uuid::Uuid;
//!
//! #[derive(Event, Clone, Debug)]
//! #[event(prefix = "booking")]
//! enum BookingEvent { Made {}, Held {}, Released {} }
//!
//! #[derive(Clone, Default)]
//! struct Booking;
//!
//! impl Aggregate for Booking {
//!     const CATEGORY: &'static str = "booking";
//!     type Command = ();
//!     type Event = BookingEvent;
//!     type Refusal = Infallible;
//!     fn decide(&self, _: &()) -> Result<Vec<BookingEvent>, Infallible> {
//!         Ok(vec![BookingEvent::Made {}])
//!     }
//!     fn evolve(&mut self, _: &BookingEvent) {}
//! }
//!
//! #[derive(Clone, Serialize, Deserialize)]
//! struct Stay;
//! impl SagaState for Stay {}
//!
//! // The hotel has three days to answer.
//! let plan = Saga::named("stay")
//!     .compensatable("hold a room", |_: &Stay| StepRequest::to("hotel", &BookingEvent::Held {}))
//!     .undo(|_| StepRequest::to("hotel", &BookingEvent::Released {}))
//!     .timeout(Duration::MAX)
//!     .deadline(Duration::from_secs(3 * 24 * 3_600))
//!     .build();
//! fn starts(message: &Message) -> Result<Option<(String, Stay)>, HandlerError> {
//!     Ok(Some((message.subject.replace("booking-", ""), Stay)))
//! }
//!
//! let clock = Clock::by_hand("2026-02-28T12:00:00Z".parse()?);
//! let store: Arc<dyn EventStore> = Arc::new(MemoryStore::with_clock(clock.clone()));
//! let runner = Runner::new(plan, LogQuery::categories(["booking"]), starts);
//! let mut runtime = Runtime::new();
//! let sagas = runner.on(store.clone());
//! let service = Service::new("desk", store.clone()).saga(runner);
//! runtime.start(vec![service], Arc::new(LocalBus::default())).await?;
//!
//! let becomes = async |status: Status| {
//!     while sagas.saga("7").await?.and_then(|saga| saga.progress).is_none_or(|found| found.status != status) {
//!         tokio::time::sleep(Duration::from_millis(5)).await;
//!     }
//!     Ok::<(), Box<dyn std::error::Error>>(())
//! };
//! Repository::<Booking>::new(store).execute("7", (), Uuid::new_v4()).await?;
//! becomes(Status::Running).await?;
//! clock.advance(Duration::from_secs(3 * 24 * 3_600));
//! becomes(Status::Compensating).await?;
//! runtime.drain(Duration::from_secs(1)).await?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod check;
mod history;
mod machine;
mod model;
mod rules;
mod specification;

pub use check::{ATTEMPTS, Check, Report, STATES_MAX, Violation, check};
pub use specification::{Given, When, given};
