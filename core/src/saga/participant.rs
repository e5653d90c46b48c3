//! The receiving side of a saga: carries out a step once, undoes it once, and refuses a step that arrives after its
//! undo.

use std::sync::Arc;

use async_trait::async_trait;
use futures::TryStreamExt;
use serde_json::Value;
use uuid::Uuid;

use super::{
    barrier::{Participation, Step, StepEvent, decide_step, step_category},
    owed::{Debtor, Owed},
    progress::{Outcome, Reply, StepRef},
    runner::Replies,
    step_command::StepCommand,
};
use crate::{
    Event,
    base::panic::caught,
    bus::Message,
    commit::COMMIT_ROWS_MAX,
    commit::{NESTING_MAX, check_json_within},
    decide::{
        aggregate::Aggregate,
        repository::Repository,
        work::{Cause, Work, WorkError},
    },
    event::{EVENT_BYTES_MAX, Position, StreamId, StreamIdError, Version, derived_id, named_id},
    handler::{HandlerError, Terminal},
    store::{EventStore, StoreError, pages},
};

/// The maximum size of a participant's answer, in bytes of JSON. The saga records the answer and the commands that
/// follow from the answer in one event, so an answer may take up half of the maximum size of an event.
pub const ANSWER_BYTES_MAX: usize = EVENT_BYTES_MAX / 2;
/// The nesting depth at which an answer begins within the events that record the answer.
const ANSWER_DEPTH: usize = 8;

/// Carries out the commands that sagas send to a service.
///
/// Effects staged in `work` are committed together with the record that the step was done. Once a step or an undo is
/// done, `perform` is not called again for that step or undo, whatever the bus delivers. An undo is called only if the
/// step was done, or may have been done: see [`StepError::Unknown`].
///
/// Stage effects first, and call outside services (such as a payment provider) last. Then no aggregate can refuse after
/// the money has moved.
///
/// ```
/// use annals::{Answer, DocumentKey, Event, Participant, StepError, Work};
/// use async_trait::async_trait;
///
/// #[derive(Event)]
/// #[event(prefix = "hotel")]
/// enum HotelCommand {
///     Hold { guest: String },
///     Release { guest: String },
/// }
///
/// /// A hotel with one room.
/// struct Hotel;
///
/// #[async_trait]
/// impl Participant for Hotel {
///     type Command = HotelCommand;
///
///     async fn perform(&self, command: HotelCommand, work: &mut Work) -> Result<Answer, StepError> {
///         let room = DocumentKey::new("room", "1");
///         let held_by: Option<String> = work.document(&room).await?;
///         match command {
///             HotelCommand::Hold { guest } => match held_by {
///                 None => work.put(&room, &guest)?,
///                 Some(other) => return Err(StepError::Refused(format!("held by {other}"))),
///             },
///             HotelCommand::Release { guest } if held_by.as_ref() == Some(&guest) => work.remove(&room),
///             HotelCommand::Release { .. } => {}
///         }
///         Ok(Answer::DONE)
///     }
/// }
/// ```
///
/// [`Service::participant`](crate::Service::participant) adds the participant to a service.
#[async_trait]
pub trait Participant: Send + Sync + 'static {
    /// The commands that the participant understands.
    type Command: Event;

    /// Carries out a command. Effects staged in `work` are committed with the answer, or discarded if the method
    /// returns an error.
    async fn perform(&self, command: Self::Command, work: &mut Work) -> Result<Answer, StepError>;
}

/// The answer of a participant that has staged its effects.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// The step is done. The saga receives the value as the outcome.
    Done(Value),
    /// The step is refused, and the staged effects record the refusal.
    Refused(String),
}

impl Answer {
    /// The step is done, without a value.
    pub const DONE: Self = Self::Done(Value::Null);
}

/// Why a step was not done. Effects staged for the step are discarded.
#[derive(Debug)]
#[non_exhaustive]
pub enum StepError {
    /// The step is refused, and the saga goes back. The operator `?` turns an aggregate's refusal into this variant. An
    /// undo must succeed, and so must a step from which the saga cannot go back. In both cases, a refusal is treated as
    /// [`Failed`](StepError::Failed), and the step is attempted again.
    Refused(String),
    /// The step could not be done now. The saga attempts the step again with the same command id. If the saga gives the
    /// step up, there is nothing to undo.
    Failed(String),
    /// It is unknown whether an outside service did the step, for example after a timeout. The saga attempts the step
    /// again with the same command id. If the saga gives the step up, the undo is called; the undo must cope with a
    /// step that did nothing. A panic is treated as this variant.
    Unknown(String),
    /// The store failed. While the store is unavailable, the command waits and the saga gets no reply; any other store
    /// error is treated as [`Failed`](StepError::Failed).
    Store(StoreError),
}

impl<R: std::error::Error + 'static> From<WorkError<R>> for StepError {
    fn from(error: WorkError<R>) -> Self {
        match error {
            WorkError::Refused(refusal) => Self::Refused(refusal.to_string()),
            WorkError::Store(error @ StoreError::Unavailable(_)) => Self::Store(error),
            error @ (WorkError::Id(_)
            | WorkError::Undecodable(_)
            | WorkError::OtherVersion { .. }
            | WorkError::Unencodable(_)
            | WorkError::Store(_)) => Self::Failed(error.to_string()),
        }
    }
}

/// The sagas of one definition that run in the same process as a participant, and on the same store.
#[derive(Clone)]
pub(crate) struct NearSagas {
    /// The service that runs the sagas.
    pub service: Arc<str>,
    pub sagas: Arc<dyn Replies>,
}

/// Carries out the step commands of a service. The trait hides the type of the participant.
#[async_trait]
pub(crate) trait Desk: Debtor {
    /// Carries out the step that a message asks for, and stages the answer. `not_stored` is set if the store has refused
    /// the effects that an earlier attempt to handle this message staged. `near` holds the sagas of the same store and
    /// process.
    async fn take(
        &self,
        message: &Message,
        not_stored: Option<&str>,
        near: &[NearSagas],
        work: &mut Work,
    ) -> Result<(), HandlerError>;
}

/// Handles the step commands of a topic: checks each command against the barrier, and passes it to the participant.
///
/// Every command gets a reply, even a command that cannot be carried out. The waiting saga can then ask again or go
/// back, and a failed command never blocks the undo that follows it in the topic.
pub(crate) struct StepHandler<P> {
    service: String,
    store: Arc<dyn EventStore>,
    participant: P,
    participations: Repository<Participation>,
}

impl<P: Participant> StepHandler<P> {
    pub fn new(service: &str, store: Arc<dyn EventStore>, participant: P) -> Self {
        let category = step_category(service);
        let participations =
            Repository::of_framework(store.clone(), &category, crate::decide::repository::CACHED_AGGREGATES);
        Self { service: service.to_owned(), store, participant, participations }
    }

    /// Carries out a step. Staged effects are discarded unless the step was done or its refusal is final.
    async fn carry_out(&self, message: &Message, step: &StepCommand, work: &mut Work) -> Result<Outcome, HandlerError> {
        let command = match message.decode::<P::Command>() {
            Ok(Some(command)) => command,
            Ok(None) => return Ok(self.unknown(message, "this build skips it")),
            Err(error) => return Ok(self.unknown(message, &error.source.to_string())),
        };
        // A participant may have done the step before it panicked.
        let performed = caught(async { self.participant.perform(command, work).await }).await;
        let outcome = match performed.unwrap_or_else(|panic| Err(StepError::Unknown(panic.to_string()))) {
            Ok(Answer::Done(answer)) => match check_answer(&answer) {
                Ok(()) => return Ok(Outcome::Done(answer)),
                // The step was done, but its answer cannot be recorded.
                Err(reason) => Outcome::Unknown(reason),
            },
            Ok(Answer::Refused(reason)) => match step.refused(reason) {
                refused @ Outcome::Refused(_) => return Ok(refused),
                // The saga attempts the step again. If the effects staged with the refusal were stored, they would be
                // stored once per attempt.
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

    /// Returns the outcome of a command that this build cannot read: a failure. The saga asks again, and another build
    /// may be able to read the command.
    fn unknown(&self, message: &Message, reason: &str) -> Outcome {
        let Message { type_name, schema_version, .. } = message;
        let service = &self.service;
        Outcome::Failed(format!(
            "unknown command {type_name} version {schema_version}: {reason}; deploy a build of {service} that knows it"
        ))
    }

    /// Returns the answer that was recorded when the step was done or refused. Returns `None` if the answer is staged
    /// but not committed yet; the commit will send that answer.
    async fn recorded(&self, saga: &str, step: &StepCommand) -> Result<Option<Outcome>, HandlerError> {
        let stream = self.participations.stream(saga)?;
        let mut events = pages::history(&*self.store, &stream, Version::START);
        while let Some(event) = events.try_next().await? {
            let Some(StepEvent::Replied { reply, .. }) = event.decode()? else { continue };
            let is_final = matches!(reply.outcome, Outcome::Done(_) | Outcome::Refused(_));
            if is_final && (reply.at, reply.call) == (step.at, step.call) {
                return Ok(Some(reply.outcome));
            }
        }
        Ok(None)
    }

    /// Returns the states of a saga's steps that were recorded before a position of the log.
    async fn known_before(&self, saga: &str, position: Position) -> Result<Participation, HandlerError> {
        let stream = self.participations.stream(saga)?;
        let mut known = Participation::default();
        let mut events = pages::history(&*self.store, &stream, Version::START);
        while let Some(event) = events.try_next().await?
            && event.position < position
        {
            if let Some(replied) = event.decode::<StepEvent>()? {
                known.evolve(&replied);
            }
        }
        Ok(known)
    }

    /// Passes the reply to the saga in this same work. The events of the saga get the ids that they would get if the
    /// reply arrived over the bus.
    async fn pass(
        sagas: &dyn Replies,
        saga: &StreamId,
        answer_id: Uuid,
        reply: &Reply,
        work: &mut Work,
    ) -> Result<bool, StoreError> {
        let id = derived_id(answer_id, 0);
        let before = work.replace_cause(Cause { id, metadata: work.metadata().caused_by(id), calls: 0 });
        let passed = sagas.pass(saga.id(), reply, work).await;
        work.replace_cause(before);
        passed
    }
}

/// Checks that the events that record an answer can be stored.
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

#[async_trait]
impl<P: Participant> Desk for StepHandler<P> {
    async fn take(
        &self,
        message: &Message,
        not_stored: Option<&str>,
        near: &[NearSagas],
        work: &mut Work,
    ) -> Result<(), HandlerError> {
        let step = StepCommand::from_message(message)?;
        // The first attempt at a step is usually the first command that the service receives from the saga.
        let first = step.attempt == 1 && !matches!(step.at, StepRef::Undo(_)) && not_stored.is_none();
        let known = if first {
            work.load_new(&self.participations, &message.key).await?
        } else {
            work.load(&self.participations, &message.key).await?
        };
        // Each attempt is answered once. The id of the answer therefore includes the attempt and the cause, because all
        // attempts at a step share one message id, and a retry by an operator repeats an attempt number. An attempt
        // that was answered is not carried out when it is delivered again: its recorded answer may be a failure, and an
        // effect that happened now would contradict that answer.
        let answer_id = named_id(message.id, &format!("answer {} {}", step.attempt, message.metadata.causation_id));
        if work.has_executed(answer_id, &self.participations, &message.key).await? {
            return Ok(());
        }
        let saga = StreamId::from_stored(&message.key);
        let is_of = |near: &&NearSagas| *near.service == *step.reply_to && near.sagas.category() == saga.category();
        // If the store has refused an earlier attempt, the data of the saga may be the reason.
        let sagas = near.iter().filter(|_| not_stored.is_none()).find(is_of).map(|near| &*near.sagas);
        if let Some(sagas) = sagas {
            sagas.meet(saga.id(), message.metadata.causation_id).await?;
        }
        let outcome = match (decide_step(&known, &step), not_stored) {
            (Step::Perform, Some(reason)) => {
                Outcome::Unknown(format!("the effects of the step cannot be stored: {reason}"))
            }
            (Step::Perform, None) => self.carry_out(message, &step, work).await?,
            (Step::Bar, _) => Outcome::Done(Value::Null),
            (Step::Refuse, _) => step.refused("the step was undone, or its undo arrived first".to_owned()),
            // A new attempt means that the recorded answer has not arrived: the answer was lost, or is late.
            (Step::Repeat, _) => match self.recorded(&message.key, &step).await? {
                Some(outcome) => outcome,
                None => return Ok(()),
            },
        };
        let reply = Reply { at: step.at, call: step.call, attempt: step.attempt, outcome: outcome.cleaned() };
        let passed = match sagas {
            // The events of the saga must not make the commit of a large step too large.
            Some(sagas) if work.rows() <= COMMIT_ROWS_MAX / 2 => {
                Self::pass(sagas, &saga, answer_id, &reply, work).await?
            }
            _ => false,
        };
        let replied = StepEvent::Replied { saga: message.key.to_string(), reply_to: step.reply_to, reply, passed };
        let stream = self.participations.stream(&message.key)?;
        work.execute_as(answer_id, &self.participations, &stream, &replied).await?;
        Ok(())
    }
}

#[async_trait]
impl<P: Participant> Debtor for StepHandler<P> {
    async fn do_again(&self, owed: &Owed, work: &mut Work) -> Result<(), HandlerError> {
        let Owed { message, reply, answered_at } = owed;
        let step = StepCommand::from_message(message)?;
        // A repeated answer has no effects of its own, and neither has the answer to an undo that had nothing to undo.
        let known = self.known_before(&message.key, *answered_at).await?;
        if decide_step(&known, &step) != Step::Perform {
            return Ok(());
        }
        match self.carry_out(message, &step, work).await? {
            outcome if outcome == reply.outcome || (matches!(outcome, Outcome::Done(_)) && work.rows() == 0) => Ok(()),
            Outcome::Done(answer) => {
                Err(format!("the step gave another answer before, and now gives {answer}")).terminal()
            }
            Outcome::Refused(reason) | Outcome::Failed(reason) | Outcome::Unknown(reason) => Err(reason).terminal(),
        }
    }
}

impl From<StreamIdError> for StepError {
    fn from(error: StreamIdError) -> Self {
        Self::Refused(error.to_string())
    }
}
