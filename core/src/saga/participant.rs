//! The other side of a saga: carries out a step once, takes it back once, and refuses a step that arrives after its undo.

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use serde_json::Value;

use super::progress::{At, Outcome, Reply};
use crate::{
    Event,
    aggregate::Aggregate,
    bus::Message,
    commit::{NESTING_MAX, check_json_within},
    event::{EVENT_BYTES_MAX, StreamIdError, Version, named_id},
    handler::{Handler, HandlerError, Terminal},
    panic::caught,
    repository::Repository,
    store::{EventStore, StoreError},
    work::{Work, WorkError},
};

/// The largest answer of a participant, in bytes of JSON. The saga records an answer in one event with the commands that
/// follow from it, so an answer takes half of what an event takes.
pub const ANSWER_BYTES_MAX: usize = EVENT_BYTES_MAX / 2;
/// How deep an answer stands in the events that record it.
const ANSWER_DEPTH: usize = 8;
/// Events read in one go when an answer is looked for.
const ANSWERS_PAGE: usize = 1_000;

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
    Store(StoreError),
}

impl<R: std::error::Error + 'static> From<WorkError<R>> for StepError {
    fn from(error: WorkError<R>) -> Self {
        match error {
            WorkError::Refused(refusal) => Self::Refused(refusal.to_string()),
            WorkError::Store(error @ StoreError::Unavailable(_)) => Self::Store(error),
            error
            @ (WorkError::Id(_) | WorkError::Undecodable(_) | WorkError::Unencodable(_) | WorkError::Store(_)) => {
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
    /// There is nothing to take back, or nothing any more: record that, so that a late step is refused.
    Bar,
    /// It was done or refused before: give the recorded answer again.
    Repeat,
    /// It was undone, or its undo came first: refuse it.
    Refuse,
}

/// The barrier, as a pure function.
pub fn decide_step(participation: &Participation, command: &StepCommand) -> Step {
    let slot = |at| participation.slots.get(&(at, command.call));
    match command.at {
        At::Forward(_) | At::Closing(_) => match slot(command.at) {
            None | Some(Slot::Unknown) => Step::Perform,
            Some(Slot::Done | Slot::Refused) => Step::Repeat,
            Some(Slot::Undone) => Step::Refuse,
        },
        At::Undo(step) => match slot(At::Forward(step)) {
            Some(Slot::Done | Slot::Unknown) => Step::Perform,
            None | Some(Slot::Refused | Slot::Undone) => Step::Bar,
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
        let known = self.slots.entry((at, reply.call)).or_insert_with(|| slot.clone());
        // What was undone stays so: a late step is answered, but never done.
        if *known != Slot::Undone {
            *known = slot;
        }
    }
}

/// Names of the message attributes that carry a step.
pub(crate) mod attribute {
    pub const AT: &str = "sagastep";
    pub const STEP_NAME: &str = "sagastepname";
    pub const CALL: &str = "sagacall";
    pub const ATTEMPT: &str = "sagaattempt";
    pub const MUST_SUCCEED: &str = "sagamustsucceed";
    pub const REPLY_TO: &str = "sagareplyto";
}

/// Takes step commands off a topic, and gives them to the participant through the barrier.
///
/// Every command is answered, whatever is wrong with it: the saga that waits can ask again or go back, and nothing that
/// went wrong on the way there stands in front of the undo.
pub(crate) struct Desk<P> {
    service: String,
    store: Arc<dyn EventStore>,
    participant: P,
    participations: Repository<Participation>,
}

impl<P: Participant> Desk<P> {
    pub fn new(service: &str, store: Arc<dyn EventStore>, participant: P) -> Self {
        let category = format!("step.{service}");
        let participations = Repository::of_framework(store.clone(), &category, crate::repository::CACHED_AGGREGATES);
        Self { service: service.to_owned(), store, participant, participations }
    }

    /// Carries out a step. What was staged is thrown away unless the step was done, or refused for good.
    async fn carry_out(&self, message: &Message, step: &StepCommand, work: &mut Work) -> Result<Outcome, HandlerError> {
        let command = match message.decode::<P::Command>() {
            Ok(Some(command)) => command,
            Ok(None) => return Ok(self.unknown(message, "this build skips it")),
            Err(error) => return Ok(self.unknown(message, &error.source.to_string())),
        };
        // A participant that panics may have done anything.
        let performed = caught(async { self.participant.perform(command, work).await }).await;
        let outcome = match performed.unwrap_or_else(|panic| Err(StepError::Unknown(panic.to_string()))) {
            Ok(Answer::Done(answer)) => match check_answer(&answer) {
                Ok(()) => return Ok(Outcome::Done(answer)),
                // It was done, and nobody can know what it gave.
                Err(reason) => Outcome::Unknown(reason),
            },
            Ok(Answer::Refused(reason)) => match step.refused(reason) {
                refused @ Outcome::Refused(_) => return Ok(refused),
                // It is asked again: what goes with the refusal is not stored once for each time.
                failed => failed,
            },
            Err(StepError::Store(error @ StoreError::Unavailable(_))) => return Err(error.into()),
            Err(StepError::Store(error)) => Outcome::Failed(error.to_string()),
            Err(StepError::Refused(reason)) => step.refused(reason),
            Err(StepError::Failed(reason)) => Outcome::Failed(reason),
            Err(StepError::Unknown(reason)) => Outcome::Unknown(reason),
        };
        work.rollback();
        Ok(outcome)
    }

    /// A command that this build cannot read was not carried out by it. The saga asks again: another build may know it.
    fn unknown(&self, message: &Message, reason: &str) -> Outcome {
        let Message { type_name, schema_version, .. } = message;
        let service = &self.service;
        Outcome::Failed(format!(
            "unknown command {type_name} version {schema_version}: {reason}; deploy a build of {service} that knows it"
        ))
    }

    /// The answer that a step got when it was done or refused. `None` if that was staged a moment ago, and so is on its
    /// way by itself.
    async fn recorded(&self, saga: &str, step: &StepCommand) -> Result<Option<Outcome>, HandlerError> {
        let stream = self.participations.stream(saga)?;
        let mut after = Version::START;
        loop {
            let page = self.store.read_stream(&stream, after, ANSWERS_PAGE).await?;
            for event in &page {
                let Some(StepEvent::Replied { reply, .. }) = event.decode()? else { continue };
                let is_final = matches!(reply.outcome, Outcome::Done(_) | Outcome::Refused(_));
                if is_final && (reply.at, reply.call) == (step.at, step.call) {
                    return Ok(Some(reply.outcome));
                }
                after = event.version;
            }
            if page.len() < ANSWERS_PAGE {
                return Ok(None);
            }
        }
    }

    /// Takes a command through the barrier and stages the answer. With `not_stored`, the store has refused what this very
    /// command staged before.
    async fn take(&self, message: &Message, not_stored: Option<&str>, work: &mut Work) -> Result<(), HandlerError> {
        let step = StepCommand {
            at: extension(message, attribute::AT)?,
            call: extension(message, attribute::CALL)?,
            attempt: extension(message, attribute::ATTEMPT)?,
            must_succeed: extension(message, attribute::MUST_SUCCEED)?,
        };
        let reply_to: String = extension(message, attribute::REPLY_TO)?;
        // The first step of a saga at a service usually is the first the service hears of it.
        let first = step.attempt == 1 && !matches!(step.at, At::Undo(_)) && not_stored.is_none();
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
        let outcome = match (decide_step(&known, &step), not_stored) {
            (Step::Perform, Some(reason)) => Outcome::Unknown(format!("what it did cannot be stored: {reason}")),
            (Step::Perform, None) => self.carry_out(message, &step, work).await?,
            (Step::Bar, _) => Outcome::Done(Value::Null),
            (Step::Refuse, _) => step.refused("it was undone, or its undo came first".to_owned()),
            // A new attempt is a sign that the answer has not arrived: it was lost, or is late.
            (Step::Repeat, _) => match self.recorded(&message.key, &step).await? {
                Some(outcome) => outcome,
                None => return Ok(()),
            },
        };
        let reply = Reply { at: step.at, call: step.call, attempt: step.attempt, outcome: outcome.cleaned() };
        let replied = StepEvent::Replied { saga: message.key.to_string(), reply_to, reply };
        let stream = self.participations.stream(&message.key)?;
        work.stage_as(answer_id, &self.participations, &stream, &replied, false).await?;
        Ok(())
    }
}

/// Whether the events that record an answer can be stored.
fn check_answer(answer: &Value) -> Result<(), String> {
    if *answer == Value::Null {
        return Ok(());
    }
    let json = serde_json::to_string(answer).map_err(|error| format!("the answer has no JSON form: {error}"))?;
    if json.len() > ANSWER_BYTES_MAX {
        return Err(format!("answer too large: {} bytes, limit {ANSWER_BYTES_MAX}", json.len()));
    }
    check_json_within(&json, NESTING_MAX - ANSWER_DEPTH)
        .map_err(|reason| format!("the answer cannot be stored: {reason}"))
}

fn extension<T: std::str::FromStr>(message: &Message, name: &str) -> Result<T, HandlerError> {
    let text = message.extensions.get(name).ok_or_else(|| format!("the command lacks the attribute {name}"));
    text.terminal()?.parse().map_err(|_| format!("attribute {name} does not read")).terminal()
}

#[async_trait]
impl<P: Participant> Handler for Desk<P> {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        self.take(message, None, work).await
    }

    async fn refused(&self, message: &Message, reason: &str, work: &mut Work) -> Result<(), HandlerError> {
        self.take(message, Some(reason), work).await
    }
}

impl From<StreamIdError> for StepError {
    fn from(error: StreamIdError) -> Self {
        Self::Refused(error.to_string())
    }
}
