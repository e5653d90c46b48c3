//! A saga as an aggregate. The stream of the saga is its history, `evolve` folds the stream, and the pure function
//! `transition` decides each change.

use std::{collections::HashMap, sync::Arc};

use uuid::Uuid;

use super::{
    definition::{Saga, SagaState},
    migration::{Trail, migrated},
    progress::{OperatorAction, Outcome, Progress, Reply, SagaEvent, StepRef},
    transition::{Input, Transition, begin, json_bytes, learn_given_up, transition},
};
use crate::{
    base::{json::to_value, panic::caught_now},
    decide::aggregate::Aggregate,
};

/// One saga, folded from its stream.
#[derive(Clone, Debug)]
pub struct SagaInstance<C> {
    context: Option<C>,
    unreadable: Option<Arc<str>>,
    /// The request that an operator recorded from outside this service: action, operator, reason.
    requested: Option<(OperatorAction, String, String)>,
    trail: Trail,
    /// The progress of the saga; `None` before it starts.
    pub progress: Option<Progress>,
}

impl<C> Default for SagaInstance<C> {
    fn default() -> Self {
        Self { context: None, unreadable: None, requested: None, trail: Vec::new(), progress: None }
    }
}

impl<C> SagaInstance<C> {
    /// Returns the steps that the saga has reached.
    #[cfg(feature = "testing")]
    pub(crate) fn trail(&self) -> &Trail {
        &self.trail
    }

    /// Returns the data of the saga; `None` before it starts.
    pub fn context(&self) -> Option<&C> {
        self.context.as_ref()
    }
}

/// The definitions under which this build runs sagas, and the migrations from other definitions.
pub struct Definitions<C> {
    pub current: Arc<Saga<C>>,
    pub older: HashMap<String, Arc<Saga<C>>>,
    pub migrations: HashMap<String, fn(&Progress) -> Progress>,
}

debug_fields!([C] Definitions<C> { current });

/// An input to a saga, with everything that a pure decision needs.
pub struct SagaCommand<C> {
    pub definitions: Arc<Definitions<C>>,
    pub saga_id: Uuid,
    pub now: i64,
    pub what: SagaInput<C>,
}

debug_fields!([C] SagaCommand<C> { saga_id, now });

pub enum SagaInput<C> {
    Begin(C),
    Reply(Reply),
    Due,
    Operate { verb: OperatorAction, by: String, reason: String },
}

impl<C> std::fmt::Debug for SagaInput<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Begin(_) => f.debug_tuple("Begin").finish_non_exhaustive(),
            Self::Reply(reply) => f.debug_tuple("Reply").field(reply).finish(),
            Self::Due => f.write_str("Due"),
            Self::Operate { verb, by, reason } => {
                f.debug_struct("Operate").field("verb", verb).field("by", by).field("reason", reason).finish()
            }
        }
    }
}

/// Why a saga accepts no input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SagaRefusal {
    /// No saga has this id.
    #[error("no such saga")]
    NotStarted,
    /// The saga was started under a definition that this build does not have. Register that definition as an older one,
    /// or register a migration from that definition.
    #[error(
        "the saga runs on definition {0}, which this build does not have: register the definition as an older one, \
         or a migration from it"
    )]
    UnknownDefinition(String),
    /// This build cannot read the data with which the saga was started, or the saga's state panics on a recorded
    /// outcome.
    #[error("the input of the saga cannot be read: {0}")]
    Unreadable(Arc<str>),
    /// The migration to this build's definition is not allowed. Correct the migration, or register the saga's present
    /// definition as an older one.
    #[error(
        "the saga cannot be moved from definition {from} to {to}: {reason}; correct the migration, or register the \
         plan as an older one"
    )]
    CannotMigrate {
        /// The hash of the saga's definition.
        from: String,
        /// The hash of this build's definition.
        to: String,
        /// Why the saga cannot continue at the place that the migration returns.
        reason: String,
    },
    /// The saga is at a place that its definition does not have. The migrations of early builds were not checked and
    /// could leave a saga in such a place.
    #[error(
        "the saga is at {at}, a place that definition {definition} does not have; abandon the saga, or migrate it \
         from there"
    )]
    Nowhere {
        /// The place of the saga.
        at: StepRef,
        /// The hash of the saga's definition.
        definition: String,
    },
    /// The action does not apply, or a command has no JSON form.
    #[error("{0}")]
    Illegal(String),
}

impl SagaRefusal {
    /// Returns whether another build may accept the input.
    pub(crate) fn awaits_build(&self) -> bool {
        match self {
            Self::UnknownDefinition(_) | Self::CannotMigrate { .. } | Self::Nowhere { .. } | Self::Unreadable(_) => {
                true
            }
            Self::NotStarted | Self::Illegal(_) => false,
        }
    }
}

impl<C> Definitions<C> {
    /// Returns whether this build can continue sagas of the definition with this hash.
    pub(crate) fn knows(&self, hash: &str) -> bool {
        self.current.hash == hash || self.older.contains_key(hash) || self.migrations.contains_key(hash)
    }
}

impl<C: SagaState> Aggregate for SagaInstance<C> {
    const CATEGORY: &'static str = "saga";
    type Command = SagaCommand<C>;
    type Event = SagaEvent;
    type Refusal = SagaRefusal;

    fn decide(&self, ask: &SagaCommand<C>) -> Result<Vec<SagaEvent>, SagaRefusal> {
        let current = &ask.definitions.current;
        let Some(progress) = &self.progress else {
            let SagaInput::Begin(context) = &ask.what else { return Err(SagaRefusal::NotStarted) };
            let given = to_value(context).map_err(|error| SagaRefusal::Illegal(error.to_string()))?;
            let moved = begin(current, ask.saga_id, context.clone(), ask.now).map_err(SagaRefusal::Illegal)?;
            let Transition { progress, send, .. } = moved;
            return Ok(vec![SagaEvent::Started { saga: current.name.to_owned(), context: given, progress, send }]);
        };
        if matches!(ask.what, SagaInput::Begin(_)) {
            return Ok(Vec::new());
        }
        if let Some(reason) = &self.unreadable {
            return Err(SagaRefusal::Unreadable(reason.clone()));
        }
        let Some(context) = &self.context else { return Err(SagaRefusal::NotStarted) };
        let mut events = Vec::new();
        let from = progress.definition.clone();
        let (definition, progress) = self.standing(&ask.definitions, progress)?;
        if progress.definition != from {
            events.push(SagaEvent::Migrated { from, progress: progress.clone() });
        }
        let input = match &ask.what {
            SagaInput::Begin(_) => return Ok(Vec::new()),
            SagaInput::Reply(reply) => Input::Reply(reply.clone()),
            SagaInput::Due => match &self.requested {
                Some(request) => {
                    events.push(carry_out(request, definition, ask, context, progress));
                    return Ok(events);
                }
                None => Input::Due,
            },
            SagaInput::Operate { verb, .. } => Input::Operate(*verb),
        };
        let moved = match input {
            Input::Reply(reply) => take_reply(reply, definition, ask, context, &progress),
            Input::Due | Input::Operate(_) => {
                let moved = transition(definition, ask.saga_id, context, &progress, &input, ask.now);
                moved.map(|moved| moved.map(|moved| (None, moved)))
            }
        };
        let Some((reply, Transition { progress, send, gave_up, fault, .. })) = moved.map_err(SagaRefusal::Illegal)?
        else {
            return Ok(Vec::new());
        };
        events.push(match &ask.what {
            SagaInput::Reply(asked) => {
                SagaEvent::Replied { reply: reply.unwrap_or_else(|| asked.clone()), gave_up, fault, progress, send }
            }
            SagaInput::Operate { verb, by, reason } => {
                SagaEvent::Operated { verb: *verb, by: by.clone(), reason: reason.clone(), progress, send }
            }
            SagaInput::Begin(_) | SagaInput::Due => SagaEvent::Timed { gave_up, fault, progress, send },
        });
        Ok(events)
    }

    fn evolve(&mut self, event: &SagaEvent) {
        let was = self.progress.replace(event.progress().clone());
        let known = event.progress().known_as();
        if self.trail.last().is_none_or(|(last, _)| *last != known) {
            self.trail.push((known, event.progress().step.as_str().into()));
        }
        match event {
            SagaEvent::Started { context, .. } => match serde_json::from_value(context.clone()) {
                Ok(context) => self.context = Some(context),
                Err(error) => self.unreadable = Some(error.to_string().into()),
            },
            SagaEvent::Replied { reply, gave_up, .. } => {
                let step = was.filter(|was| was.known_as() == reply.at && !matches!(was.at, StepRef::Undo(_)));
                if let (Some(step), Outcome::Done(_) | Outcome::Refused(_)) = (step, &reply.outcome) {
                    self.learn(&step.step, &reply.outcome);
                }
                self.learn_given_up(gave_up.as_ref());
            }
            SagaEvent::Timed { gave_up, .. } => self.learn_given_up(gave_up.as_ref()),
            SagaEvent::Requested { verb, by, reason, .. } => {
                self.requested = Some((*verb, by.clone(), reason.clone()));
            }
            SagaEvent::Operated { .. } | SagaEvent::Declined { .. } => self.requested = None,
            SagaEvent::Migrated { .. } => {}
        }
    }
}

/// Carries out or declines an operator's request. Either way the request is handled only once.
fn carry_out<C: SagaState>(
    (verb, by, reason): &(OperatorAction, String, String),
    definition: &Saga<C>,
    ask: &SagaCommand<C>,
    context: &C,
    progress: Progress,
) -> SagaEvent {
    let (verb, by, reason) = (*verb, by.clone(), reason.clone());
    let why = match transition(definition, ask.saga_id, context, &progress, &Input::Operate(verb), ask.now) {
        Ok(Some(Transition { progress, send, .. })) => return SagaEvent::Operated { verb, by, reason, progress, send },
        Ok(None) => "the action changes nothing".to_owned(),
        Err(why) => why,
    };
    SagaEvent::Declined { verb, by, why, progress: Progress { due: None, ..progress } }
}

/// The reply as the saga records it, if the input is a reply, and the transition that follows from the input.
type TakenReply<C> = (Option<Reply>, Transition<C>);

/// Returns the transition that follows from a reply, and the reply as the saga records it. If the saga cannot continue
/// with an answer, the step counts as failed, so that the saga can go back.
fn take_reply<C: SagaState>(
    reply: Reply,
    definition: &Saga<C>,
    ask: &SagaCommand<C>,
    context: &C,
    progress: &Progress,
) -> Result<Option<TakenReply<C>>, String> {
    let input = Input::Reply(reply);
    let moved = caught_now(|| transition(definition, ask.saga_id, context, progress, &input, ask.now));
    let Input::Reply(reply) = input else { return Ok(None) };
    let trouble = match moved {
        Err(panic) => format!("applying the answer to the saga's state failed: {panic}"),
        Ok(Err(illegal)) => return Err(illegal),
        Ok(Ok(None)) => return Ok(None),
        Ok(Ok(Some(moved))) => {
            let answer = if let Outcome::Done(answer) = &reply.outcome { json_bytes(answer) } else { 0 };
            let can_go_back = moved.progress.failure.is_none() && is_compensatable(definition, progress.at);
            match moved.too_large_by.filter(|too_many| can_go_back && *too_many <= answer) {
                None => return Ok(Some((Some(reply), moved))),
                Some(too_many) => {
                    let limit = answer - too_many;
                    format!(
                        "answer too large: {answer} bytes, limit {limit} in addition to the data in the next commands"
                    )
                }
            }
        }
    };
    let outcome = Outcome::Failed(trouble).cleaned();
    let input = Input::Reply(Reply { outcome, ..reply });
    let moved = transition(definition, ask.saga_id, context, progress, &input, ask.now)?;
    let Input::Reply(reply) = input else { return Ok(None) };
    Ok(moved.map(|moved| (Some(reply), moved)))
}

fn is_compensatable<C: SagaState>(definition: &Saga<C>, at: StepRef) -> bool {
    matches!(at, StepRef::Forward(step) if step < definition.compensatable())
}

impl<C: SagaState> SagaInstance<C> {
    /// Returns the definition with which the saga continues, and the saga's progress in that definition.
    pub(crate) fn standing<'a>(
        &self,
        definitions: &'a Definitions<C>,
        progress: &Progress,
    ) -> Result<(&'a Saga<C>, Progress), SagaRefusal> {
        let (hash, current) = (&progress.definition, &definitions.current);
        let (definition, progress) = if *hash == current.hash {
            (current, progress.clone())
        } else if let Some(migrate) = definitions.migrations.get(hash) {
            let moved = migrated(*migrate, progress, &self.trail, current);
            let (from, to) = (hash.clone(), current.hash.clone());
            (current, moved.map_err(|reason| SagaRefusal::CannotMigrate { from, to, reason })?)
        } else {
            let older = definitions.older.get(hash);
            (older.ok_or_else(|| SagaRefusal::UnknownDefinition(hash.clone()))?, progress.clone())
        };
        if !definition.has(&progress) {
            return Err(SagaRefusal::Nowhere { at: progress.at, definition: progress.definition });
        }
        Ok((definition, progress))
    }

    /// Updates the saga's state. A panic here means that the state of this build cannot handle an outcome that an
    /// earlier build recorded; this build would have recorded that outcome as a failure.
    fn learn(&mut self, step: &str, outcome: &Outcome) {
        let Some(context) = &mut self.context else { return };
        if let Err(panic) = caught_now(|| context.learn(step, outcome)) {
            self.unreadable = Some(format!("step {step:?}: {panic}").into());
        }
    }

    fn learn_given_up(&mut self, gave_up: Option<&super::Failure>) {
        if let (Some(failure), Some(context)) = (gave_up, &mut self.context) {
            learn_given_up(context, failure);
        }
    }
}
