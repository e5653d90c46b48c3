//! How far one saga has come, and the events that record it.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::transition::Verb;
use crate::{Event, reason};

/// The state of a saga as operators see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Going forward.
    Running,
    /// Going back.
    Compensating,
    /// Every step is done.
    Completed,
    /// Every step is undone.
    Compensated,
    /// A step that must succeed was given up: an operator has to act.
    Stuck,
}

impl Status {
    /// Whether nothing more will happen by itself or by an operator.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Compensated)
    }
}

/// Where in its plan a saga is: `forward.2`, `undo.0`, `closing.1`. Steps count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum At {
    /// Carrying out this step.
    Forward(usize),
    /// Undoing this step.
    Undo(usize),
    /// Carrying out this step of the end of a compensated saga.
    Closing(usize),
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forward(step) => write!(f, "forward.{step}"),
            Self::Undo(step) => write!(f, "undo.{step}"),
            Self::Closing(step) => write!(f, "closing.{step}"),
        }
    }
}

impl From<At> for String {
    fn from(at: At) -> Self {
        at.to_string()
    }
}

impl FromStr for At {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no place in a saga, such as forward.0");
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

impl TryFrom<String> for At {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// What is known of one participant in the present step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CallState {
    /// Asked, and not heard of. It may have happened or not.
    Waiting,
    /// Done.
    Done,
    /// Refused: it did not happen.
    Refused,
    /// Failed: it did not happen this time, or nobody knows.
    Failed,
}

/// What went wrong at a step.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Failure {
    /// The step.
    pub step: String,
    /// What was wrong.
    pub reason: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.reason)
    }
}

/// What became of a step that went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// It failed, and is asked for again.
    Failed,
    /// No answer came in time, and it is asked for again.
    TimedOut,
    /// It was given up, and the saga goes back.
    GaveUp,
    /// It was given up and cannot be taken back: a person has to act.
    Stuck,
}

/// What an event says of a step that went wrong, for the log of the process and its counters.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fault {
    /// What became of it.
    pub kind: FaultKind,
    /// The step.
    pub step: String,
    /// Which attempt.
    pub attempt: u32,
    /// The start of what was wrong.
    pub reason: String,
    /// The services that were asked and did not answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<String>,
}

/// How far a saga has come. Times are in milliseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Progress {
    /// Its state.
    pub status: Status,
    /// Where in the plan.
    pub at: At,
    /// The name of that step.
    pub step: String,
    /// What is known of its participants.
    pub calls: Vec<CallState>,
    /// How often the step was asked for.
    pub attempt: u32,
    /// Whether `due` is when to ask again, rather than when to stop waiting.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub retrying: bool,
    /// The step's timer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due: Option<i64>,
    /// When the saga is to be compensated if it has not reached its pivot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<i64>,
    /// Why it goes back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// What went wrong last at the step it is at, whether it asks again or is stuck.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<Failure>,
    /// The definition it keeps to.
    pub definition: String,
    /// The numbers that steps go by at their participants, for a saga that was moved to a plan in which they have other
    /// places. Without, they go by their places.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub numbers: BTreeMap<String, usize>,
    /// When it started.
    pub started: i64,
    /// When it ended, or was abandoned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<i64>,
}

impl Progress {
    /// When it wants attention next.
    pub fn wakes(&self) -> Option<i64> {
        match (self.due, self.deadline) {
            (Some(due), Some(deadline)) => Some(due.min(deadline)),
            (due, deadline) => due.or(deadline),
        }
    }

    /// The step that it is at, as the participants know it: the same for as long as the saga runs, whatever plan it is moved to.
    pub fn known_as(&self) -> At {
        self.number_of(self.at, &self.step)
    }

    /// A step of its plan, with this place and this name, as the participants know it.
    pub(crate) fn number_of(&self, at: At, step: &str) -> At {
        let number = |place: usize| self.numbers.get(step).copied().unwrap_or(place);
        match at {
            At::Forward(place) => At::Forward(number(place)),
            At::Undo(place) => At::Undo(number(place)),
            At::Closing(place) => At::Closing(number(place)),
        }
    }

    /// What operators read first: what is wrong now, and why it goes back.
    pub fn last_error(&self) -> Option<String> {
        match (&self.trouble, &self.failure) {
            (Some(trouble), Some(failure)) => Some(format!("{trouble}; it goes back because of {failure}")),
            (trouble, failure) => trouble.as_ref().or(failure.as_ref()).map(Failure::to_string),
        }
    }
}

/// How a step ended, as a saga's state gets to know it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done, with what the participant replied.
    Done(serde_json::Value),
    /// Refused, with the reason.
    Refused(String),
    /// Failed this time, with the reason; or given up by the saga.
    Failed(String),
    /// It is not known whether it was done this time, with the reason. A saga asks again as after a failure; its
    /// participant remembers that there may be something to undo.
    Unknown(String),
}

impl Outcome {
    /// The same with its reason as it can be stored.
    pub(crate) fn cleaned(self) -> Self {
        match self {
            Self::Done(answer) => Self::Done(answer),
            Self::Refused(reason) => Self::Refused(reason::storable(&reason)),
            Self::Failed(reason) => Self::Failed(reason::storable(&reason)),
            Self::Unknown(reason) => Self::Unknown(reason::storable(&reason)),
        }
    }

    /// The reason; empty for a step that was done.
    pub(crate) fn reason(&self) -> &str {
        match self {
            Self::Done(_) => "",
            Self::Refused(reason) | Self::Failed(reason) | Self::Unknown(reason) => reason,
        }
    }
}

/// What a participant replied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// To which step.
    pub at: At,
    /// Which of its participants.
    pub call: usize,
    /// To which attempt.
    pub attempt: u32,
    /// What became of it.
    pub outcome: Outcome,
}

/// A command on its way to a participant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Command {
    /// The same on each attempt.
    pub id: Uuid,
    /// The service that carries it out.
    pub to: String,
    /// The name of the command.
    #[serde(rename = "type")]
    pub type_name: String,
    /// The schema version of `data`.
    pub schema_version: i32,
    /// The step it belongs to.
    pub at: At,
    /// Which of its participants.
    pub call: usize,
    /// Which attempt.
    pub attempt: u32,
    /// Whether the saga cannot go back from here: a refusal then is one more failure.
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

/// What happened to a saga. Every event carries the progress after it, and the commands it sends: the relay needs nothing
/// else.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "saga")]
pub enum SagaEvent {
    /// It began.
    Started {
        /// Its name.
        saga: String,
        /// What it was given, as JSON.
        context: serde_json::Value,
        /// Where it stands now.
        progress: Progress,
        /// What it asks for.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        send: Vec<Command>,
    },
    /// A participant replied.
    Replied {
        /// What.
        reply: Reply,
        /// The step it gave up because of it, and why.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gave_up: Option<Failure>,
        /// What went wrong.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fault: Option<Fault>,
        /// Where it stands now.
        progress: Progress,
        /// What it asks for.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        send: Vec<Command>,
    },
    /// A timer fired.
    Timed {
        /// The step it gave up because of it, and why.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gave_up: Option<Failure>,
        /// What went wrong.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fault: Option<Fault>,
        /// Where it stands now.
        progress: Progress,
        /// What it asks for.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        send: Vec<Command>,
    },
    /// An operator acted.
    Operated {
        /// How.
        verb: Verb,
        /// Who.
        by: String,
        /// Why.
        reason: String,
        /// Where it stands now.
        progress: Progress,
        /// What it asks for.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        send: Vec<Command>,
    },
    /// An operator asks for a verb from outside: whoever runs the saga carries it out, or declines.
    Requested {
        /// Which.
        verb: Verb,
        /// Who.
        by: String,
        /// Why.
        reason: String,
        /// As before, but for the timer: it is due at once.
        progress: Progress,
    },
    /// What an operator asked for does not apply.
    Declined {
        /// Which.
        verb: Verb,
        /// Who asked for it.
        by: String,
        /// Why not.
        why: String,
        /// As before.
        progress: Progress,
    },
    /// It was moved to another definition.
    Migrated {
        /// The definition it kept to before.
        from: String,
        /// Where it stands now.
        progress: Progress,
    },
}

impl SagaEvent {
    /// Where the saga stands after this event.
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
