//! Sagas. A saga is a typed plan of steps across several services. The plan can be drawn as a diagram. The same pure
//! function serves to run, replay and model-check a saga.
//!
//! | file | contents |
//! |---|---|
//! | `definition` | the plan: compensatable steps, at most one pivot, then retriable steps |
//! | `progress` | the progress of one saga, and the events that record it |
//! | `glimpse` | reads single fields of the events |
//! | `transition` | the pure function from progress and input to progress and commands |
//! | `instance` | a saga as an aggregate |
//! | `migration` | moves a saga to another plan, or refuses the move |
//! | `runner` | starts sagas, and passes replies to them |
//! | `participant` | the receiving side: carries out each step once |
//! | `step_command` | a command of a saga as a message to a participant |
//! | `barrier` | decides which steps a participant carries out, and rejects late and repeated steps |
//! | `owed` | work that a restored participant repeats before it accepts commands |
//! | `end` | lets callers outside of a saga wait until the saga ends |
//! | `request` | a request of an operator to a stuck saga |
//! | `index` | one document per saga, which operators read and which helps to find due timers |
//! | `timers` | the timers that this process remembers |
//! | `firing` | finds the timers and requests that are due, and passes them to the sagas |
//! | `diagram` | draws a plan as Mermaid or SVG |
//! | `path` | draws the path that one saga took |

mod barrier;
mod definition;
mod diagram;
mod end;
mod firing;
mod glimpse;
mod index;
mod instance;
mod migration;
mod owed;
mod participant;
mod path;
mod progress;
mod request;
mod runner;
mod step_command;
mod timers;
mod transition;

pub use barrier::{Participation, Step, StepEvent, StepState, decide_step};
pub use definition::{
    ATTEMPTS_MAX, AfterPivot, Closing, Kind, NeedsUndo, Open, Plan, RETRY_DELAY_MAX, RETRY_DELAY_MIN, STEP_TIMEOUT,
    Saga, SagaState, StepRequest, Undoable,
};
pub use end::wait_for_end;
pub use glimpse::{CurrentStep, Glimpse};
pub use index::{Index, STUCK, SagaStatus};
#[cfg(feature = "testing")]
pub(crate) use instance::{Definitions, SagaCommand, SagaInput, go_on};
pub use instance::{SagaInstance, SagaRefusal};
#[cfg(feature = "testing")]
pub(crate) use migration::ReachedStep;
pub(crate) use owed::settle;
pub use owed::{Owed, StepKey};
pub use participant::{ANSWER_BYTES_MAX, Answer, Participant, StepError};
pub(crate) use participant::{Desk, NearSagas, StepHandler};
pub use path::Path;
pub use progress::{
    BY_ITSELF, CallState, Command, Failure, Fault, FaultKind, OperatorAction, Outcome, Progress, Reply, SagaEvent,
    Status, StepRef, StepRefError,
};
pub(crate) use request::SagaRequest;
pub(crate) use runner::{Replies, Starter};
pub use runner::{Runner, Sagas, Starts};
pub use step_command::StepCommand;
pub use transition::{COMMANDS_BYTES_MAX, Input, Transition, begin, transition};
