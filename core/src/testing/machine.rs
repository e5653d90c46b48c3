//! The saga in the model. The real transition function makes every move; the resulting event is written as JSON, read
//! back and folded.
//!
//! A place is one state that a saga can reach. Many paths lead to the same few places, so places are numbered, and the
//! moves between places are cached. Time is abstract: a timer is due "soon", a deadline is due "later", and the clock
//! is at 0 again before each move.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use uuid::Uuid;

use super::{
    model::ModelMessage,
    rules::{self, PlanProgress},
};
use crate::{
    decide::aggregate::Aggregate,
    event::Event,
    saga::{
        Command, Definitions, Failure, Input, OperatorAction, Outcome, Progress, ReachedStep, Reply, Saga, SagaCommand,
        SagaEvent, SagaInput, SagaInstance, SagaRequest, SagaState, Status, StepRef, Transition, begin, go_on,
        transition,
    },
};

/// The time at which a timer is due, in the model's milliseconds.
const SOON: i64 = 1;
/// The time at which a deadline is due: after any timer, because the model fires the deadline separately.
const LATER: i64 = 1_000_000_000;

/// An input to the saga.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Happening {
    Hear(Arc<ModelMessage>),
    Timer,
    Deadline,
    Retry,
    /// The newer build takes over, and moves the saga to its plan.
    Deploy,
}

/// One state that a saga can reach.
pub(super) struct Place<C> {
    instance: SagaInstance<C>,
    /// One path to this place, as events.
    history: Vec<Arc<Written>>,
    pub progress: Progress,
    /// Whether the newer build, which moves the saga to another plan, is running.
    pub deployed: bool,
}

/// A move: the place to which it leads, and the messages that it sends.
#[derive(Clone, Debug)]
pub(super) struct Leap {
    pub to: usize,
    pub send: Vec<Arc<ModelMessage>>,
}

/// `Err` names the rule that the move breaks.
type CheckedMove = Result<Option<Leap>, String>;

pub(super) struct Machine<C> {
    definitions: Arc<Definitions<C>>,
    /// The definitions of the earlier build, if the saga is moved from that build's plan.
    earlier: Option<Arc<Definitions<C>>>,
    context: C,
    known: Mutex<Known<C>>,
}

/// The key that identifies a place.
type Standing = (String, Progress, bool, Vec<ReachedStep>);

struct Known<C> {
    places: Vec<Arc<Place<C>>>,
    numbers: HashMap<Standing, usize>,
    moves: HashMap<(Option<usize>, Option<Happening>), CheckedMove>,
}

/// A function that takes the progress of a saga under an earlier plan, and returns the saga's progress in the current
/// plan.
pub(super) type Migrate = fn(&Progress) -> Progress;

/// The saga's id; any value works.
const SAGA_ID: Uuid = Uuid::from_u128(0x5a6a);

impl<C: SagaState> Machine<C> {
    pub fn new(saga: Saga<C>, earlier: Option<(Saga<C>, Migrate)>, context: C) -> Self {
        let definitions = |saga, migrations| Definitions { current: Arc::new(saga), older: HashMap::new(), migrations };
        let migrations = earlier.iter().map(|(plan, migrate)| (plan.hash.clone(), *migrate)).collect();
        let earlier = earlier.map(|(plan, _)| Arc::new(definitions(plan, HashMap::new())));
        let known = Known { places: Vec::new(), numbers: HashMap::new(), moves: HashMap::new() };
        Self { definitions: Arc::new(definitions(saga, migrations)), earlier, context, known: Mutex::new(known) }
    }

    /// Returns the definitions of the running build.
    fn definitions(&self, deployed: bool) -> &Arc<Definitions<C>> {
        self.earlier.as_ref().filter(|_| !deployed).unwrap_or(&self.definitions)
    }

    /// Returns the plan that a saga with this progress follows.
    pub fn plan(&self, progress: &Progress) -> PlanProgress<'_, C> {
        let known = [Some(&self.definitions), self.earlier.as_ref()].into_iter().flatten();
        let mut plans = known.map(|definitions| &*definitions.current);
        let saga = plans.find(|plan| plan.hash == progress.definition).unwrap_or(&self.definitions.current);
        PlanProgress { saga, progress: progress.clone() }
    }

    /// Returns whether the newer build can still take over at this place.
    pub fn can_deploy(&self, place: &Place<C>) -> bool {
        self.earlier.is_some() && !place.deployed && place.progress.ended.is_none()
    }

    pub fn place(&self, number: usize) -> Arc<Place<C>> {
        self.known().places[number].clone()
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known<C>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the first move.
    pub fn begin(&self) -> CheckedMove {
        self.remembered(None, None)
    }

    /// Returns the move that `happening` causes at a place, or `None` if `happening` changes nothing.
    pub fn happens(&self, place: usize, happening: Happening) -> CheckedMove {
        self.remembered(Some(place), Some(happening))
    }

    fn remembered(&self, place: Option<usize>, happening: Option<Happening>) -> CheckedMove {
        let key = (place, happening);
        if let Some(known) = self.known().moves.get(&key) {
            return known.clone();
        }
        let made = self.make(key.0, key.1.as_ref());
        self.known().moves.insert(key, made.clone());
        made
    }

    fn make(&self, place: Option<usize>, happening: Option<&Happening>) -> CheckedMove {
        let from = place.map(|place| self.place(place));
        let mut instance = from.as_ref().map(|from| from.instance.clone()).unwrap_or_default();
        let deployed = self.earlier.is_none() || from.as_ref().is_some_and(|from| from.deployed);
        if let (Some(Happening::Deploy), Some(from)) = (happening, &from) {
            let context = json(instance.context().ok_or("a saga that began has no context")?)?;
            let to = self.number(instance, from.history.clone(), context, from.progress.clone(), true)?;
            return Ok(Some(Leap { to, send: Vec::new() }));
        }
        let mut history = from.as_ref().map(|from| from.history.clone()).unwrap_or_default();
        if let (Some(Happening::Retry), Some(from)) = (happening, &from) {
            let requested = Arc::new(write(&retry(&from.progress))?);
            requested.fold(&mut instance)?;
            history.push(requested);
        }
        let (what, now) = self.input(happening)?;
        let definitions = self.definitions(deployed);
        let moved = in_memory(&instance, definitions, &what, now)?;
        let ask = SagaCommand { definitions: definitions.clone(), saga_id: SAGA_ID, now, what };
        let events = instance.decide(&ask).map_err(|refusal| format!("the saga refuses: {refusal}"))?;
        let (moves, of_input) = match &events[..] {
            [moves @ SagaEvent::Migrated { .. }, rest @ ..] => (Some(moves), rest),
            all => (None, all),
        };
        // A late answer is recorded by one event, and by a second event if a stuck saga continues.
        let (Some(moved), [_] | [SagaEvent::Replied { .. }, SagaEvent::Operated { .. }]) = (moved, of_input) else {
            return if events.is_empty() {
                Ok(None)
            } else {
                Err(format!("{} events are recorded for one input", events.len()))
            };
        };
        for event in moves.into_iter().chain(of_input) {
            history.push(Arc::new(write(event)?));
        }
        let folded = restart::<C>(&history)?;
        let context = json(folded.context().ok_or("the input of the saga cannot be read back from its history")?)?;
        let progress = folded.progress.clone().ok_or("a saga with a history has no progress")?;
        if progress != moved.progress {
            return Err(format!(
                "after a crash the saga stands elsewhere: {:?} in memory, {progress:?} from its history",
                moved.progress
            ));
        }
        if context != json(&moved.context)? {
            let memory = json(&moved.context)?;
            return Err(format!(
                "after a crash the saga has another state: {memory} in memory, {context} from its history"
            ));
        }
        if let (Some(from), Some(happening)) = (&from, happening) {
            rules::moved(self.plan(&progress).saga, &from.progress, happening, &progress)?;
        }
        rules::timers(&progress, &moved.send, now)?;
        let to = self.number(folded, history, context, progress, deployed)?;
        let send = moved.send.iter().map(|command| Arc::new(ModelMessage::of(command))).collect();
        let leap = Leap { to, send };
        if let Some(Happening::Hear(message)) = happening
            && self.transition(&self.place(to), &Input::Reply(message.reply()?), 0)?.is_some()
        {
            return Err(format!("{message} changes the saga once more when it is repeated"));
        }
        Ok(Some(leap))
    }

    /// Returns the input that `happening` gives to the saga, and the time of that input.
    fn input(&self, happening: Option<&Happening>) -> Result<(SagaInput<C>, i64), String> {
        match happening {
            None => Ok((SagaInput::Begin(self.context.clone()), 0)),
            Some(Happening::Hear(message)) => Ok((SagaInput::Reply(message.reply()?), 0)),
            Some(Happening::Timer) => Ok((SagaInput::Due, SOON)),
            Some(Happening::Deadline) => Ok((SagaInput::Due, LATER)),
            Some(Happening::Retry) => Ok((SagaInput::Request, 0)),
            Some(Happening::Deploy) => Err("nothing is deployed before the saga begins".to_owned()),
        }
    }

    fn transition(&self, place: &Place<C>, input: &Input, now: i64) -> Result<Option<Transition<C>>, String> {
        let context = place.instance.context().ok_or("a saga that began has no context")?;
        transition(self.plan(&place.progress).saga, SAGA_ID, context, &place.progress, input, now)
    }

    /// Returns the number of a place. A new place is first checked: at this place, the saga must ignore all inputs that
    /// must not move it.
    fn number(
        &self,
        mut instance: SagaInstance<C>,
        history: Vec<Arc<Written>>,
        context: String,
        progress: Progress,
        deployed: bool,
    ) -> Result<usize, String> {
        let progress = Progress {
            due: progress.due.map(|_| SOON),
            deadline: progress.deadline.map(|_| LATER),
            started: 0,
            ended: progress.ended.map(|_| 0),
            // The reason is for operators to read; no move depends on it.
            failure: progress.failure.map(|_| Failure { step: String::new(), reason: String::new() }),
            trouble: None,
            ..progress
        };
        // The trail (the steps that the saga has reached) is part of the key if the saga can be migrated, because the
        // result of a migration depends on the trail.
        let trail = if self.earlier.is_some() { instance.trail().to_vec() } else { Vec::new() };
        let key = (context, progress, deployed, trail);
        if let Some(number) = self.known().numbers.get(&key) {
            return Ok(*number);
        }
        instance.progress = Some(key.1.clone());
        let place = Place { instance, history, progress: key.1.clone(), deployed };
        self.deaf(&place)?;
        let mut known = self.known();
        let number = known.places.len();
        known.places.push(Arc::new(place));
        known.numbers.insert(key, number);
        Ok(number)
    }

    /// Checks that the saga ignores the inputs that must not move it: a reply to another step, a failure of an earlier
    /// attempt, a timer that is not due, and any input after the end. Because this check tries every such reply, the
    /// model need not keep late replies in flight.
    fn deaf(&self, place: &Place<C>) -> Result<(), String> {
        let progress = &place.progress;
        let plan = self.plan(progress);
        let saga = plan.saga;
        if self.transition(place, &Input::Due, 0)?.is_some() {
            return Err(format!("a timer that is not due moves the saga at {:?}", progress.step));
        }
        let forward = (0..saga.steps.len()).map(|step| (StepRef::Forward(step), &saga.steps[step]));
        let undo = (0..saga.compensatable()).map(|step| (StepRef::Undo(step), &saga.steps[step]));
        let closing = (0..saga.closing.len()).map(|step| (StepRef::Closing(step), &saga.closing[step]));
        for (at, planned) in forward.chain(undo).chain(closing) {
            let left = at != progress.at || progress.ended.is_some();
            let at = plan.known_as(at);
            for call in 0..planned.calls.len() {
                for attempt in 1..=planned.attempts_max {
                    for outcome in late_outcomes() {
                        let stale = attempt < progress.attempt || progress.retrying;
                        let is_late = left || stale && matches!(outcome, Outcome::Failed(_) | Outcome::Unknown(_));
                        if !is_late {
                            continue;
                        }
                        let what = format!("{outcome:?}");
                        let reply = Reply { at, call, attempt, outcome };
                        if self.transition(place, &Input::Reply(reply), 0)?.is_some() {
                            let step = planned.name;
                            let here = rules::place(progress);
                            return Err(format!(
                                "a late reply of step {step:?} ({at}, {what}) changes the saga {here}"
                            ));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

impl<C> Place<C> {
    pub fn is_stuck(&self) -> bool {
        self.progress.status == Status::Stuck
    }
}

fn late_outcomes() -> [Outcome; 4] {
    let late = || "late".to_owned();
    [
        Outcome::Done(serde_json::Value::Null),
        Outcome::Refused(late()),
        Outcome::Failed(late()),
        Outcome::Unknown(late()),
    ]
}

/// An event as a store returns it.
struct Written {
    type_name: &'static str,
    schema_version: i32,
    data: String,
}

fn write(event: &SagaEvent) -> Result<Written, String> {
    let data = event.encode().map_err(|error| error.to_string())?;
    Ok(Written { type_name: event.type_name(), schema_version: event.schema_version(), data })
}

/// Makes the move as a running service does, from the saga in memory.
fn in_memory<C: SagaState>(
    instance: &SagaInstance<C>,
    definitions: &Definitions<C>,
    what: &SagaInput<C>,
    now: i64,
) -> Result<Option<Transition<C>>, String> {
    let input = match what {
        SagaInput::Begin(context) => return begin(&definitions.current, SAGA_ID, context.clone(), now).map(Some),
        SagaInput::Reply(reply) => Input::Reply(reply.clone()),
        SagaInput::Due => Input::Due,
        SagaInput::Request => Input::Operate(instance.request().ok_or("no request waits")?.verb),
    };
    let (Some(context), Some(progress)) = (instance.context(), &instance.progress) else {
        return Err("a saga that began has no context".to_owned());
    };
    let (definition, progress) =
        instance.standing(definitions, progress).map_err(|refusal| format!("the saga refuses: {refusal}"))?;
    let Some(moved) = transition(definition, SAGA_ID, context, &progress, &input, now)? else { return Ok(None) };
    match (&input, go_on(definition, SAGA_ID, &moved.context, &moved.progress, now)) {
        (Input::Reply(_), Some(SagaEvent::Operated { progress, send, .. })) => {
            Ok(Some(Transition { progress, send, ..moved }))
        }
        _ => Ok(Some(moved)),
    }
}

/// Returns the event that records the request of an operator to retry the step at which a saga is stuck.
fn retry(stuck: &Progress) -> SagaEvent {
    let request = SagaRequest { verb: OperatorAction::Retry, by: "model".to_owned(), reason: "model".to_owned() };
    request.recorded(stuck.clone(), 0)
}

impl Written {
    /// Reads the event and applies it to a saga.
    fn fold<C: SagaState>(&self, instance: &mut SagaInstance<C>) -> Result<(), String> {
        let event = SagaEvent::decode(self.type_name, self.schema_version, &self.data);
        let event = event.map_err(|error| error.to_string())?;
        instance.evolve(&event.ok_or("an event of the saga is skipped when it is read")?);
        Ok(())
    }
}

/// Rebuilds a saga as a service does after a crash, from the history alone.
fn restart<C: SagaState>(history: &[Arc<Written>]) -> Result<SagaInstance<C>, String> {
    let mut instance = SagaInstance::default();
    for written in history {
        written.fold(&mut instance)?;
    }
    Ok(instance)
}

fn json<C: SagaState>(context: &C) -> Result<String, String> {
    serde_json::to_string(context).map_err(|error| format!("the saga's state has no JSON form: {error}"))
}

impl ModelMessage {
    fn of(command: &Command) -> Self {
        Self::Command {
            at: command.at,
            call: command.call,
            attempt: command.attempt,
            must_succeed: command.must_succeed,
            id: command.id,
            to: command.to.clone(),
            type_name: command.type_name.clone(),
            schema_version: command.schema_version,
            data: command.data.get().to_owned(),
        }
    }

    fn reply(&self) -> Result<Reply, String> {
        match self {
            Self::Reply { at, call, attempt, outcome } => {
                let outcome = serde_json::from_str(outcome).map_err(|error| error.to_string())?;
                Ok(Reply { at: *at, call: *call, attempt: *attempt, outcome })
            }
            Self::Command { .. } => Err("a command came to the saga".to_owned()),
        }
    }
}
