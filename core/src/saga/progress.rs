//! The progress of one saga, and the events that record it.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::{Event, base::reason};

/// The state of a saga as operators see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The saga is going forward.
    Running,
    /// The saga is going back: it undoes its steps.
    Compensating,
    /// Every step is done.
    Completed,
    /// Every step is undone.
    Compensated,
    /// The saga gave up a step that must succeed, and an operator has to act. If the answer to that step arrives after
    /// all, the saga continues.
    Stuck,
}

impl Status {
    /// Returns whether the saga is over: neither the saga nor an operator can change anything more.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Compensated)
    }
}

/// The point that a saga has reached in its plan, such as `forward.2`, `undo.0` or `closing.1`. Steps are numbered
/// from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum StepRef {
    /// The saga carries out this step.
    Forward(usize),
    /// The saga undoes this step.
    Undo(usize),
    /// The saga is compensated, and carries out this closing step.
    Closing(usize),
}

impl fmt::Display for StepRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forward(step) => write!(f, "forward.{step}"),
            Self::Undo(step) => write!(f, "undo.{step}"),
            Self::Closing(step) => write!(f, "closing.{step}"),
        }
    }
}

impl From<StepRef> for String {
    fn from(at: StepRef) -> Self {
        at.to_string()
    }
}

/// The string does not name a place in a saga.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a place in a saga; a valid place is forward.0")]
pub struct StepRefError(pub String);

impl FromStr for StepRef {
    type Err = StepRefError;
    fn from_str(text: &str) -> Result<Self, StepRefError> {
        let wrong = || StepRefError(text.to_owned());
        let (part, step) = text.split_once('.').ok_or_else(wrong)?;
        let step = step.parse().map_err(|_| wrong())?;
        match part {
            "forward" => Ok(Self::Forward(step)),
            "undo" => Ok(Self::Undo(step)),
            "closing" => Ok(Self::Closing(step)),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for StepRef {
    type Error = StepRefError;
    fn try_from(text: String) -> Result<Self, StepRefError> {
        text.parse()
    }
}

/// The state of one participant in the current step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CallState {
    /// The participant was asked and has not replied. The step may or may not have happened.
    Waiting,
    /// The participant has done its part.
    Done,
    /// The participant refused: its part did not happen.
    Refused,
    /// The participant failed: its part did not happen this time, or the outcome is unknown.
    Failed,
}

/// An error at a step.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Failure {
    /// The step.
    pub step: String,
    /// The reason for the error.
    pub reason: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.reason)
    }
}

/// What the saga does after a fault at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// The step failed, and is attempted again.
    Failed,
    /// No reply came in time, and the step is attempted again.
    TimedOut,
    /// The saga gave up the step, and goes back.
    GaveUp,
    /// The saga gave up the step but cannot go back: an operator has to act.
    Stuck,
}

/// The part of an event that describes a fault at a step. The process prints the fault as a log line (`tracing`) and
/// counts it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fault {
    /// What the saga does after the fault.
    pub kind: FaultKind,
    /// The step.
    pub step: String,
    /// The number of the attempt.
    pub attempt: u32,
    /// The first characters of the reason.
    pub reason: String,
    /// The services that were asked and did not reply.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<String>,
}

/// The progress of a saga. Times are in milliseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Progress {
    /// The state of the saga.
    pub status: Status,
    /// The place in the plan.
    pub at: StepRef,
    /// The name of the current step.
    pub step: String,
    /// The states of the participants in the current step.
    pub calls: Vec<CallState>,
    /// The number of attempts at the current step.
    pub attempt: u32,
    /// Whether `due` is the time of the next attempt, rather than the end of the wait for replies.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub retrying: bool,
    /// The time of the step's timer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due: Option<i64>,
    /// The time at which the saga is compensated if it has not reached its pivot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<i64>,
    /// Why the saga goes back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// The last error at the current step, whether the step is attempted again or the saga is stuck.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<Failure>,
    /// The hash of the definition under which the saga runs.
    pub definition: String,
    /// The numbers under which participants know the steps. After a migration to a plan with a different order of
    /// steps, the number of a step may differ from its place in the plan. When this map is empty, the number of each
    /// step is its place.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub numbers: BTreeMap<String, usize>,
    /// When the saga started.
    pub started: i64,
    /// When the saga ended, or was abandoned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<i64>,
}

impl Progress {
    /// Returns the time at which the next timer of the saga is due.
    pub fn wakes(&self) -> Option<i64> {
        match (self.due, self.deadline) {
            (Some(due), Some(deadline)) => Some(due.min(deadline)),
            (due, deadline) => due.or(deadline),
        }
    }

    /// Returns the current step as the participants know it. Participants know a step under the same number as long as
    /// the saga runs, even if the saga is moved to another plan.
    pub fn known_as(&self) -> StepRef {
        self.number_of(self.at, &self.step)
    }

    /// Returns the step with this place and this name in the plan, as the participants know it.
    pub(crate) fn number_of(&self, at: StepRef, step: &str) -> StepRef {
        let number = |place: usize| self.numbers.get(step).copied().unwrap_or(place);
        match at {
            StepRef::Forward(place) => StepRef::Forward(number(place)),
            StepRef::Undo(place) => StepRef::Undo(number(place)),
            StepRef::Closing(place) => StepRef::Closing(number(place)),
        }
    }

    /// Returns whether the saga is stuck although the answers to its step have arrived.
    pub(crate) fn is_stuck_but_answered(&self) -> bool {
        let is_answered =
            self.calls.contains(&CallState::Refused) || self.calls.iter().all(|call| *call == CallState::Done);
        self.status == Status::Stuck && self.ended.is_none() && is_answered
    }

    /// Returns the text that operators read first: the current error, and why the saga goes back.
    pub fn last_error(&self) -> Option<String> {
        match (&self.trouble, &self.failure) {
            (Some(trouble), Some(failure)) => Some(format!("{trouble}; the saga goes back because of {failure}")),
            (trouble, failure) => trouble.as_ref().or(failure.as_ref()).map(Failure::to_string),
        }
    }
}

/// The name that is recorded instead of an operator's name if a stuck saga continues because a late answer has arrived.
pub const BY_ITSELF: &str = "the saga itself";

/// An action of an operator on a stuck saga.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OperatorAction {
    /// Attempt again the step at which the saga is stuck.
    Retry,
    /// Treat the step as done, and continue.
    SkipStep,
    /// Go back and undo the steps. This is possible only up to the pivot; at the pivot, the operator vouches that the
    /// pivot did not happen.
    Compensate,
    /// Leave the saga in its present state permanently.
    Abandon,
}

/// The outcome of a step, as passed to the saga's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The step was done; the value is the participant's answer.
    Done(serde_json::Value),
    /// The step was refused for this reason.
    Refused(String),
    /// The step failed this time for this reason, or the saga gave the step up.
    Failed(String),
    /// It is unknown whether the step was done; the string gives the reason. The saga attempts the step again as after
    /// a failure; the participant remembers that there may be something to undo.
    Unknown(String),
}

impl Outcome {
    /// Returns the outcome with its reason changed, if necessary, to text that the store accepts.
    pub(crate) fn cleaned(self) -> Self {
        match self {
            Self::Done(answer) => Self::Done(answer),
            Self::Refused(reason) => Self::Refused(reason::storable(&reason)),
            Self::Failed(reason) => Self::Failed(reason::storable(&reason)),
            Self::Unknown(reason) => Self::Unknown(reason::storable(&reason)),
        }
    }

    /// Returns the reason, which is empty for a step that was done.
    pub(crate) fn reason(&self) -> &str {
        match self {
            Self::Done(_) => "",
            Self::Refused(reason) | Self::Failed(reason) | Self::Unknown(reason) => reason,
        }
    }
}

/// The reply of a participant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The step that the reply answers.
    pub at: StepRef,
    /// The index of the participant within the step.
    pub call: usize,
    /// The attempt that the reply answers.
    pub attempt: u32,
    /// The outcome of the step.
    pub outcome: Outcome,
}

/// A command on its way to a participant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Command {
    /// The id of the command, which is the same for each attempt.
    pub id: Uuid,
    /// The service that carries out the command.
    pub to: String,
    /// The name of the command.
    #[serde(rename = "type")]
    pub type_name: String,
    /// The schema version of `data`.
    pub schema_version: i32,
    /// The step that the command belongs to.
    pub at: StepRef,
    /// The index of the participant within the step.
    pub call: usize,
    /// The number of the attempt.
    pub attempt: u32,
    /// Whether the saga cannot go back from this step: a refusal then counts as one more failure.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub must_succeed: bool,
    /// The command as JSON.
    pub data: Box<RawValue>,
}

impl PartialEq for Command {
    fn eq(&self, other: &Self) -> bool {
        (self.id, self.at, self.call, self.attempt, self.data.get())
            == (other.id, other.at, other.call, other.attempt, other.data.get())
    }
}

/// An event of a saga. Every event contains the progress of the saga after the event, and the commands to send. The
/// relay needs nothing else.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "saga")]
pub enum SagaEvent {
    /// The saga started.
    Started {
        /// The name of the saga.
        saga: String,
        /// The initial data of the saga, as JSON.
        context: serde_json::Value,
        /// The progress after this event.
        progress: Progress,
        /// The commands that the saga sends.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        send: Vec<Command>,
    },
    /// A participant replied.
    Replied {
        /// The reply.
        reply: Reply,
        /// The step that the saga gave up because of the reply, and why.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gave_up: Option<Failure>,
        /// The fault at the step.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fault: Option<Fault>,
        /// The progress after this event.
        progress: Progress,
        /// The commands that the saga sends.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        send: Vec<Command>,
    },
    /// A timer fired.
    Timed {
        /// The step that the saga gave up because of the timer, and why.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gave_up: Option<Failure>,
        /// The fault at the step.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fault: Option<Fault>,
        /// The progress after this event.
        progress: Progress,
        /// The commands that the saga sends.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        send: Vec<Command>,
    },
    /// An operator acted, or the answer that a stuck saga lacked has arrived.
    Operated {
        /// The action.
        verb: OperatorAction,
        /// The operator, or [`BY_ITSELF`].
        by: String,
        /// The operator's reason.
        reason: String,
        /// The progress after this event.
        progress: Progress,
        /// The commands that the saga sends.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        send: Vec<Command>,
    },
    /// An operator requested an action from outside the service that runs the saga. That service carries out the
    /// action, or declines the request.
    Requested {
        /// The requested action.
        verb: OperatorAction,
        /// The operator.
        by: String,
        /// The operator's reason.
        reason: String,
        /// The progress, unchanged except that `due` is the time of the request.
        progress: Progress,
    },
    /// The action that an operator requested does not apply.
    Declined {
        /// The declined action.
        verb: OperatorAction,
        /// The operator.
        by: String,
        /// Why the action was declined.
        why: String,
        /// The progress, unchanged.
        progress: Progress,
    },
    /// The saga was moved to another definition.
    Migrated {
        /// The hash of the previous definition.
        from: String,
        /// The progress after this event.
        progress: Progress,
    },
}

impl SagaEvent {
    /// Returns the progress of the saga after this event.
    pub fn progress(&self) -> &Progress {
        match self {
            Self::Started { progress, .. }
            | Self::Replied { progress, .. }
            | Self::Timed { progress, .. }
            | Self::Operated { progress, .. }
            | Self::Requested { progress, .. }
            | Self::Declined { progress, .. }
            | Self::Migrated { progress, .. } => progress,
        }
    }
}
