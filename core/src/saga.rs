//! Sagas: a typed plan of steps over several services. The plan can be drawn; one pure function runs, replays and
//! model-checks it.
//!
//! | file | contents |
//! |---|---|
//! | `definition` | the plan: compensatable steps, at most one pivot, then retriable steps |
//! | `progress` | the progress of one saga, and the events that record it |
//! | `transition` | the pure function from progress and input to progress and commands |
//! | `instance` | a saga as an aggregate |
//! | `migration` | moves a saga to another plan, or refuses the move |
//! | `runner` | starts sagas, passes replies and timers to them, and carries out the actions of operators |
//! | `participant` | the receiving side: carries out each step once, and keeps the barrier against late steps |
//! | `owed` | work that a restored participant repeats before it accepts commands |
//! | `index` | one document per saga: for operators, and to find the timers that are due |
//! | `timers` | computes when timers are due, and fires them |
//! | `diagram` | draws a plan as Mermaid or SVG |
//! | `path` | draws the path that one saga took |

mod definition;
mod diagram;
mod index;
mod instance;
mod migration;
mod owed;
mod participant;
mod path;
mod progress;
mod runner;
mod timers;
mod transition;

pub use definition::{
    ATTEMPTS_MAX, AfterPivot, Closing, Kind, NeedsUndo, Open, Plan, RETRY_DELAY_MAX, RETRY_DELAY_MIN, Request,
    STEP_TIMEOUT, Saga, SagaState, Undoable,
};
pub use index::{Index, STUCK, SagaStatus};
#[cfg(feature = "testing")]
pub(crate) use instance::{Ask, Definitions, What};
pub use instance::{Instance, SagaRefusal};
pub(crate) use owed::{Debtor, settle};
pub use owed::{Owed, StepKey};
pub use participant::{ANSWER_BYTES_MAX, decide_step};
pub use participant::{Answer, Participant, Participation, Slot, Step, StepCommand, StepError, StepEvent};
pub(crate) use participant::{Desk, attribute};
pub use path::Path;
pub use progress::{At, CallState, Command, Failure, Fault, FaultKind, Outcome, Progress, Reply, SagaEvent, Status};
pub(crate) use runner::{Replies, Starter};
pub use runner::{Runner, Starts};
pub use transition::{COMMANDS_BYTES_MAX, Input, Moved, Verb, begin, transition};
