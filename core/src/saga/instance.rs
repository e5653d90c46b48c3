//! A saga as an aggregate. The stream of the saga is its history, `evolve` folds the stream, and the pure function
//! `transition` decides each change.

use std::{collections::HashMap, sync::Arc};

use uuid::Uuid;

use super::{
    definition::{Saga, SagaState},
    migration::{ReachedStep, Trail, migrated},
    progress::{BY_ITSELF, OperatorAction, Outcome, Progress, Reply, SagaEvent, StepRef},
    request::{SagaRequest, marked, unmarked},
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
    /// The operator's request, if any, that the saga has not yet carried out or declined.
    request: Option<SagaRequest>,
    trail: Trail,
    /// The progress of the saga; `None` before it starts.
    pub progress: Option<Progress>,
}

impl<C> Default for SagaInstance<C> {
    fn default() -> Self {
        Self { context: None, unreadable: None, request: None, trail: Vec::new(), progress: None }
    }
}

impl<C> SagaInstance<C> {
    /// Returns the steps that the saga has reached.
    #[cfg(feature = "testing")]
    pub(crate) fn trail(&self) -> &Trail {
        &self.trail
    }

    /// Returns the request of an operator that waits.
    #[cfg(feature = "testing")]
    pub(crate) fn request(&self) -> Option<&SagaRequest> {
        self.request.as_ref()
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
    /// A timer is due.
    Due,
    /// The request of an operator, which the stream of the saga records, waits for its answer.
    Request,
}

impl<C> std::fmt::Debug for SagaInput<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Begin(_) => f.debug_tuple("Begin").finish_non_exhaustive(),
            Self::Reply(reply) => f.debug_tuple("Reply").field(reply).finish(),
            Self::Due => f.write_str("Due"),
            Self::Request => f.write_str("Request"),
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
    /// The saga is at a place that its definition does not have. Early builds did not check migrations, so a migration
    /// could leave a saga at such a place.
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
        let mut goes_on = None;
        let event = match &ask.what {
            SagaInput::Begin(_) => None,
            SagaInput::Reply(reply) => {
                let taken = take_reply(reply.clone(), definition, ask, context, &progress);
                taken.map_err(SagaRefusal::Illegal)?.map(|(reply, moved)| {
                    let Transition { context, progress, send, gave_up, fault, .. } = moved;
                    // A late reply does not answer the request of an operator. While a request waits, the document of
                    // the saga therefore stays due, and the saga does not continue by itself.
                    let progress = match self.request {
                        Some(_) => marked(progress, ask.now),
                        None => {
                            goes_on = go_on(definition, ask.saga_id, &context, &progress, ask.now);
                            progress
                        }
                    };
                    SagaEvent::Replied { reply, gave_up, fault, progress, send }
                })
            }
            SagaInput::Due => {
                let moved = transition(definition, ask.saga_id, context, &progress, &Input::Due, ask.now);
                moved.map_err(SagaRefusal::Illegal)?.map(|moved| {
                    let Transition { progress, send, gave_up, fault, .. } = moved;
                    SagaEvent::Timed { gave_up, fault, progress, send }
                })
            }
            SagaInput::Request => self.request.as_ref().map(|request| {
                let carried_out = carry_out(request, definition, ask, context, progress);
                goes_on = go_on(definition, ask.saga_id, context, carried_out.progress(), ask.now);
                carried_out
            }),
        };
        let Some(event) = event else { return Ok(Vec::new()) };
        events.push(event);
        events.extend(goes_on);
        Ok(events)
    }

    fn evolve(&mut self, event: &SagaEvent) {
        self.request = SagaRequest::after(event, self.request.take());
        let progress = event.progress().clone();
        let was = self.progress.replace(if self.request.is_some() { unmarked(progress) } else { progress });
        let Progress { step, calls, .. } = event.progress();
        let at = event.progress().known_as();
        if self.trail.last().is_none_or(|last| last.at != at) {
            self.trail.push(ReachedStep { at, name: step.as_str().into(), calls: calls.len() });
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
            SagaEvent::Requested { .. }
            | SagaEvent::Operated { .. }
            | SagaEvent::Declined { .. }
            | SagaEvent::Migrated { .. } => {}
        }
    }
}

/// Carries out or declines an operator's request. Either way the request is handled only once.
fn carry_out<C: SagaState>(
    request: &SagaRequest,
    definition: &Saga<C>,
    ask: &SagaCommand<C>,
    context: &C,
    progress: Progress,
) -> SagaEvent {
    let SagaRequest { verb, by, reason } = request.clone();
    let why = match transition(definition, ask.saga_id, context, &progress, &Input::Operate(verb), ask.now) {
        Ok(Some(Transition { progress, send, .. })) => return SagaEvent::Operated { verb, by, reason, progress, send },
        Ok(None) => "the action changes nothing".to_owned(),
        Err(why) => why,
    };
    SagaEvent::Declined { verb, by, why, progress }
}

/// Returns the event that lets a stuck saga continue without an operator, if the answer that the saga was waiting for
/// has arrived. The event is the same as after an operator's retry, so the timeline, and builds that do not know this
/// rule, understand the history.
pub(crate) fn go_on<C: SagaState>(
    definition: &Saga<C>,
    saga_id: Uuid,
    context: &C,
    progress: &Progress,
    now: i64,
) -> Option<SagaEvent> {
    if !progress.is_stuck_but_answered() {
        return None;
    }
    let verb = OperatorAction::Retry;
    let moved = transition(definition, saga_id, context, progress, &Input::Operate(verb), now);
    let Transition { progress, send, .. } = moved.ok()??;
    let reason = "the answer to the step has arrived".to_owned();
    Some(SagaEvent::Operated { verb, by: BY_ITSELF.to_owned(), reason, progress, send })
}

/// Returns the transition that follows from a reply, and the reply as the saga records it. If the saga cannot continue
/// with an answer, the step counts as failed, so that the saga can go back.
fn take_reply<C: SagaState>(
    reply: Reply,
    definition: &Saga<C>,
    ask: &SagaCommand<C>,
    context: &C,
    progress: &Progress,
) -> Result<Option<(Reply, Transition<C>)>, String> {
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
                None => return Ok(Some((reply, moved))),
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
    Ok(moved.map(|moved| (reply, moved)))
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
        let hash = &progress.definition;
        let current = &definitions.current;
        let (definition, progress) = if *hash == current.hash {
            (current, progress.clone())
        } else if let Some(migrate) = definitions.migrations.get(hash) {
            let moved = migrated(*migrate, progress, &self.trail, current);
            let from = hash.clone();
            let to = current.hash.clone();
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

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::saga::{CallState, OperatorAction, Status, StepRequest};

    #[derive(Clone, Debug, Serialize, Deserialize)]
    struct Trip;
    impl SagaState for Trip {}

    #[derive(annals::Event)]
    #[event(prefix = "hotel")]
    enum HotelCommand {
        Hold {},
    }

    /// A saga with a single step of two calls, each with an undo. Each call and each undo is attempted only once.
    struct Trips(Arc<Definitions<Trip>>);

    impl Trips {
        fn new() -> Self {
            let hold = |_: &Trip| StepRequest::to("hotel", &HotelCommand::Hold {});
            let plan = Saga::<Trip>::named("trip").compensatable("hold", hold).undo(hold).and(hold).undo(hold);
            let plan = plan.attempts(1).build();
            let older = HashMap::new();
            let migrations = HashMap::new();
            Self(Arc::new(Definitions { current: Arc::new(plan), older, migrations }))
        }

        /// Passes an input to the saga at this time, and returns the event that follows.
        fn pass(&self, saga: &mut SagaInstance<Trip>, now: i64, what: SagaInput<Trip>) -> Option<SagaEvent> {
            let ask = SagaCommand { definitions: self.0.clone(), saga_id: Uuid::nil(), now, what };
            let mut events = saga.decide(&ask).unwrap_or_else(|refusal| panic!("{refusal}"));
            events.iter().for_each(|event| saga.evolve(event));
            events.pop()
        }
    }

    #[test]
    fn request_waits_through_timers_and_late_replies() {
        let trips = Trips::new();
        let mut saga = SagaInstance::default();
        trips.pass(&mut saga, 0, SagaInput::Begin(Trip));
        for timeouts in 1..=2 {
            trips.pass(&mut saga, timeouts * i64::from(u32::MAX), SagaInput::Due);
        }
        let stuck = saga.progress.clone().expect("the saga has begun");
        assert_eq!((stuck.status, stuck.due), (Status::Stuck, None));

        let request = SagaRequest { verb: OperatorAction::SkipStep, by: "ann".to_owned(), reason: "seen".to_owned() };
        let requested = request.clone().recorded(stuck.clone(), 5);
        // The document of the saga becomes due, and the saga itself has no timer.
        assert_eq!(requested.progress().wakes(), Some(5));
        saga.evolve(&requested);
        assert_eq!((&saga.progress, &saga.request), (&Some(stuck.clone()), &Some(request.clone())));
        assert_eq!(trips.pass(&mut saga, i64::MAX, SagaInput::Due), None);

        let reply = Reply { at: stuck.at, call: 1, attempt: 1, outcome: Outcome::Done(serde_json::Value::Null) };
        let late = trips.pass(&mut saga, 7, SagaInput::Reply(reply)).expect("the reply is recorded");
        assert_eq!(late.progress().wakes(), Some(7), "the document of the saga stays due");
        let calls = vec![CallState::Waiting, CallState::Done];
        assert_eq!((&saga.progress, &saga.request), (&Some(Progress { calls, ..stuck }), &Some(request)));

        let answer = trips.pass(&mut saga, 8, SagaInput::Request).expect("the service answers");
        assert!(matches!(answer, SagaEvent::Operated { verb: OperatorAction::SkipStep, .. }), "{answer:?}");
        assert_eq!((answer.progress().status, &saga.request), (Status::Compensated, &None));
        assert_eq!(trips.pass(&mut saga, 9, SagaInput::Request), None);
    }
}
