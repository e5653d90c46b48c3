//! The other side of a saga: carries out a step once, takes it back once, and refuses a step that arrives after its undo.

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use serde_json::Value;

use super::progress::{At, Outcome, Reply};
use crate::{
    Event,
    aggregate::Aggregate,
    bus::Message,
    event::{StreamIdError, named_id},
    handler::{Handler, HandlerError, Terminal},
    panic::caught,
    repository::Repository,
    store::EventStore,
    work::{Work, WorkError},
};

/// Carries out the commands that sagas send to a service.
///
/// What it stages in `work` commits together with the record that the step was done. It is called once per step and once
/// per undo, whatever the bus delivers; an undo only where the step was done, or may have been done: see
/// [`StepError::Unknown`].
///
/// Stage first and call an outside party last: then no refusal by an aggregate comes after the money moved.
#[async_trait]
pub trait Participant: Send + Sync + 'static {
    /// The commands it knows.
    type Command: Event;

    /// Carries out a command. What it stages is committed with the answer; on an error it is thrown away.
    async fn perform(&self, command: Self::Command, work: &mut Work) -> Result<Answer, StepError>;
}

/// What a participant answers, having staged what belongs to it.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// It is done; the saga learns the value.
    Done(Value),
    /// It will not be done, and what was staged says so.
    Refused(String),
}

impl Answer {
    /// It is done, and there is nothing more to say.
    pub const DONE: Self = Self::Done(Value::Null);
}

/// Why a step was not done. What was staged for it is thrown away.
#[derive(Debug)]
pub enum StepError {
    /// It will not be done: the saga goes back. `?` on an aggregate's refusal becomes this. An undo, and a step that the
    /// saga cannot go back from, must succeed: there it is taken as [`Failed`](StepError::Failed), and asked for again.
    Refused(String),
    /// It could not be done now: the saga asks again with the same id. If it gives the step up, there is nothing to undo.
    Failed(String),
    /// It is not known whether an outside party did it, as when no answer came in time: the saga asks again with the same
    /// id. If it gives the step up, the undo is called, and takes back what is there, which may be nothing. A panic is
    /// taken as this.
    Unknown(String),
    /// The store is away; nobody else is told.
    Store(crate::store::StoreError),
}

impl<R: std::error::Error + 'static> From<WorkError<R>> for StepError {
    fn from(error: WorkError<R>) -> Self {
        match error {
            WorkError::Refused(refusal) => Self::Refused(refusal.to_string()),
            WorkError::Store(error) => Self::Store(error),
            error @ (WorkError::Id(_) | WorkError::Undecodable(_) | WorkError::Unencodable(_)) => {
                Self::Failed(error.to_string())
            }
        }
    }
}

/// What a service did of one saga's steps.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "step")]
pub enum StepEvent {
    /// A step was done, refused or failed.
    Replied {
        /// The saga's stream.
        saga: String,
        /// The service that runs the saga.
        reply_to: String,
        /// What became of the step.
        reply: Reply,
    },
}

/// What is known of one step.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// It may have been done: an attempt had an unknown outcome.
    Unknown,
    /// It was done.
    Done,
    /// It was refused, for good.
    Refused,
    /// It was undone, or its undo came first: it will not be done any more.
    Undone,
}

/// The steps of one saga at one service. Its stream is the barrier.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Participation {
    slots: BTreeMap<(At, usize), Slot>,
}

/// A step as it arrives.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCommand {
    /// Where in the plan.
    pub at: At,
    /// Which participant of the step.
    pub call: usize,
    /// Which attempt.
    pub attempt: u32,
    /// Whether a refusal is one more failure, because the saga cannot go back.
    pub must_succeed: bool,
}

impl StepCommand {
    /// What becomes of a step that its participant refuses. Were it recorded as refused although it must succeed, the
    /// barrier would bar every further attempt.
    pub fn refused(&self, reason: String) -> Outcome {
        if self.must_succeed { Outcome::Failed(reason) } else { Outcome::Refused(reason) }
    }
}

/// What to do about a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Carry it out.
    Perform,
    /// There is nothing to take back: record that, so that a late step is refused.
    Bar,
    /// It was answered before, or it is late: do nothing.
    Ignore,
}

/// The barrier, as a pure function.
pub fn decide_step(participation: &Participation, command: &StepCommand) -> Step {
    let slot = |at| participation.slots.get(&(at, command.call));
    match command.at {
        At::Forward(_) | At::Closing(_) => match slot(command.at) {
            None | Some(Slot::Unknown) => Step::Perform,
            Some(Slot::Done | Slot::Refused | Slot::Undone) => Step::Ignore,
        },
        At::Undo(step) => match slot(At::Forward(step)) {
            Some(Slot::Done | Slot::Unknown) => Step::Perform,
            None | Some(Slot::Refused) => Step::Bar,
            Some(Slot::Undone) => Step::Ignore,
        },
    }
}

impl Participation {
    /// What is known of a step.
    pub fn slot(&self, at: At, call: usize) -> Option<&Slot> {
        self.slots.get(&(at, call))
    }
}

impl Aggregate for Participation {
    const CATEGORY: &'static str = "step";
    type Command = StepEvent;
    type Event = StepEvent;
    type Refusal = std::convert::Infallible;

    fn decide(&self, command: &StepEvent) -> Result<Vec<StepEvent>, Self::Refusal> {
        Ok(vec![command.clone()])
    }

    fn evolve(&mut self, StepEvent::Replied { reply, .. }: &StepEvent) {
        let (at, slot) = match (reply.at, &reply.outcome) {
            // Whatever was known before is as true as it was.
            (_, Outcome::Failed(_)) | (At::Undo(_), Outcome::Unknown(_)) => return,
            (at, Outcome::Unknown(_)) => (at, Slot::Unknown),
            (At::Undo(step), _) => (At::Forward(step), Slot::Undone),
            (at, Outcome::Done(_)) => (at, Slot::Done),
            (at, Outcome::Refused(_)) => (at, Slot::Refused),
        };
        self.slots.insert((at, reply.call), slot);
    }
}

/// Names of the message attributes that carry a step.
pub(crate) mod attribute {
    pub const AT: &str = "sagastep";
    pub const CALL: &str = "sagacall";
    pub const ATTEMPT: &str = "sagaattempt";
    pub const MUST_SUCCEED: &str = "sagamustsucceed";
    pub const REPLY_TO: &str = "sagareplyto";
}

/// Takes step commands off a topic, and gives them to the participant through the barrier.
pub(crate) struct Desk<P> {
    participant: P,
    participations: Repository<Participation>,
}

impl<P: Participant> Desk<P> {
    pub fn new(service: &str, store: Arc<dyn EventStore>, participant: P) -> Self {
        let participations = Repository::with(store, &format!("step.{service}"), crate::repository::CACHED_AGGREGATES);
        Self { participant, participations }
    }
}

impl<P: Participant> Desk<P> {
    /// A participant that panics may have done anything, and the saga is told so: it can ask again, or go back.
    async fn perform(&self, command: P::Command, work: &mut Work) -> Result<Answer, StepError> {
        let performed = caught(async { self.participant.perform(command, work).await }).await;
        performed.unwrap_or_else(|panic| Err(StepError::Unknown(panic.to_string())))
    }
}

fn extension<T: std::str::FromStr>(message: &Message, name: &str) -> Result<T, HandlerError> {
    let text = message.extensions.get(name).ok_or_else(|| format!("the command lacks the attribute {name}"));
    text.terminal()?.parse().map_err(|_| format!("attribute {name} does not read")).terminal()
}

#[async_trait]
impl<P: Participant> Handler for Desk<P> {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let step = StepCommand {
            at: extension(message, attribute::AT)?,
            call: extension(message, attribute::CALL)?,
            attempt: extension(message, attribute::ATTEMPT)?,
            must_succeed: extension(message, attribute::MUST_SUCCEED)?,
        };
        let reply_to: String = extension(message, attribute::REPLY_TO)?;
        let Some(command) = message.decode::<P::Command>()? else { return Ok(()) };
        // The first step of a saga at a service usually is the first the service hears of it.
        let first = step.attempt == 1 && !matches!(step.at, At::Undo(_));
        let known = if first {
            work.load_new(&self.participations, &message.key).await?
        } else {
            work.load(&self.participations, &message.key).await?
        };
        // All attempts at a step have one id, and one that an operator asks for has the number of an earlier one; each is
        // answered once. One that was answered is not carried out again when it is delivered again: it may have failed,
        // and what it did now would not be known to have been done.
        let answer_id = named_id(message.id, &format!("answer {} {}", step.attempt, message.metadata.causation_id));
        if work.has_executed(answer_id, &self.participations, &message.key).await? {
            return Ok(());
        }
        let outcome = match decide_step(&known, &step) {
            Step::Ignore => return Ok(()),
            Step::Bar => Outcome::Done(Value::Null),
            Step::Perform => match self.perform(command, work).await {
                Ok(Answer::Done(reply)) => Outcome::Done(reply),
                Ok(Answer::Refused(reason)) => {
                    let outcome = step.refused(reason);
                    if matches!(outcome, Outcome::Failed(_)) {
                        // It is asked again: what goes with the refusal is not stored once for each time.
                        work.rollback();
                    }
                    outcome
                }
                Err(StepError::Store(error)) => return Err(error.into()),
                Err(StepError::Refused(reason)) => {
                    work.rollback();
                    step.refused(reason)
                }
                Err(StepError::Failed(reason)) => {
                    work.rollback();
                    Outcome::Failed(reason)
                }
                Err(StepError::Unknown(reason)) => {
                    work.rollback();
                    Outcome::Unknown(reason)
                }
            },
        };
        let reply = Reply { at: step.at, call: step.call, attempt: step.attempt, outcome };
        let replied = StepEvent::Replied { saga: message.key.to_string(), reply_to, reply };
        let stream = self.participations.stream(&message.key)?;
        work.stage_as(answer_id, &self.participations, &stream, &replied, false).await?;
        Ok(())
    }
}

impl From<StreamIdError> for StepError {
    fn from(error: StreamIdError) -> Self {
        Self::Refused(error.to_string())
    }
}
