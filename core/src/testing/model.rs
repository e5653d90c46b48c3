//! The state space: one saga, the barriers of its services, every message in flight, the world, and every possible
//! move.
//!
//! A sent message stays in flight: the message may arrive at any time, in any order, again and again, or never. The
//! model therefore needs no separate moves for a lost message, a late message, or a message delivered again after a
//! crash, and the state space stays finite without a limit on the number of faults. A message is dropped only when a
//! trial shows that neither the saga nor a service reacts to the message any more. For every state that the saga can
//! reach, [`Machine`] checks that replies to other steps change nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Debug},
    hash::Hash,
    sync::Arc,
};

use serde_json::Value;
use stateright::{Model, Property};
use uuid::Uuid;

use super::{
    machine::{Happening, Leap, Machine},
    rules::Ledger,
};
use crate::{
    decide::aggregate::Aggregate,
    saga::{
        Outcome, Participation, Reply, SagaState, Status, Step, StepCommand, StepError, StepEvent, StepRef, StepState,
        decide_step,
    },
};

/// A message in flight.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum ModelMessage {
    Command {
        at: StepRef,
        call: usize,
        attempt: u32,
        must_succeed: bool,
        id: Uuid,
        to: String,
        type_name: String,
        schema_version: i32,
        data: String,
    },
    Reply {
        at: StepRef,
        call: usize,
        attempt: u32,
        outcome: String,
    },
}

impl ModelMessage {
    pub fn at(&self) -> StepRef {
        match self {
            Self::Command { at, .. } | Self::Reply { at, .. } => *at,
        }
    }

    fn command(&self) -> StepCommand {
        match self {
            Self::Command { at, call, attempt, must_succeed, .. } => StepCommand {
                at: *at,
                call: *call,
                attempt: *attempt,
                must_succeed: *must_succeed,
                reply_to: String::new(),
            },
            Self::Reply { at, call, attempt, .. } => {
                StepCommand { at: *at, call: *call, attempt: *attempt, must_succeed: false, reply_to: String::new() }
            }
        }
    }

    /// Returns the reply to a command.
    fn answer(command: &StepCommand, outcome: &Outcome) -> Result<Self, String> {
        let StepCommand { at, call, attempt, .. } = *command;
        let outcome = serde_json::to_string(outcome).map_err(|error| error.to_string())?;
        Ok(Self::Reply { at, call, attempt, outcome })
    }

    fn is_failure(&self) -> bool {
        matches!(self, Self::Reply { outcome, .. }
            if outcome.starts_with("{\"failed\"") || outcome.starts_with("{\"unknown\""))
    }
}

impl fmt::Display for ModelMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Command { at, attempt, type_name, .. } => write!(f, "command {type_name} ({at}, attempt {attempt})"),
            Self::Reply { at, attempt, outcome, .. } => write!(f, "reply {outcome} ({at}, attempt {attempt})"),
        }
    }
}

/// How a service handles a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Luck {
    Does,
    Refuses,
    Fails,
    /// The service, or an outside service on its behalf, does the step, but the outcome stays unknown.
    Vanishes,
}

/// One move of the model.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Action {
    Begin,
    /// A command arrives at its service.
    Take(Arc<ModelMessage>, Luck),
    /// The saga gets an input.
    Saga(Happening),
}

/// Everything that survives a crash.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ModelState<W> {
    /// The place of the saga; `None` before it starts.
    pub place: Option<usize>,
    pub flying: Arc<BTreeSet<Arc<ModelMessage>>>,
    /// The state of each service's barrier.
    pub services: Arc<BTreeMap<String, Participation>>,
    pub ledger: Arc<Ledger>,
    pub world: Arc<W>,
    /// The rule that the last move broke.
    pub broken: Option<Arc<str>>,
}

/// A function that carries out a command in the world, given the command's type, schema version and data. The outer
/// error means that the service cannot read the command, or that the model of the service panicked.
pub(super) type Act<W> = Box<dyn Fn(&mut W, &str, i32, &str) -> Result<Result<Value, StepError>, String> + Send + Sync>;
/// A named invariant of the world.
pub(super) type Always<W> = (&'static str, Box<dyn Fn(&W) -> bool + Send + Sync>);
/// A named invariant of the world and of the saga's final status.
pub(super) type AtEnd<W> = (&'static str, Box<dyn Fn(&W, Status) -> bool + Send + Sync>);

/// The faults that are switched on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Troubles {
    pub steps_fail: bool,
    pub messages_repeat: bool,
    pub timers_fire: bool,
}

pub(super) struct Protocol<C, W> {
    pub machine: Machine<C>,
    pub world: W,
    pub services: BTreeMap<String, Act<W>>,
    pub always: Vec<Always<W>>,
    pub at_end: Vec<AtEnd<W>>,
    pub troubles: Troubles,
}

/// The reason with which a participant refuses a step that arrives after its undo.
const TOO_LATE: &str = "too late";
/// The maximum number of moves in which a saga must end once no more faults happen.
const SUNNY_MOVES_MAX: usize = 1_000;

impl<C, W> Protocol<C, W>
where
    C: SagaState,
    W: Clone + Debug + Eq + Hash + Send + Sync + 'static,
{
    /// Returns the state after `action`, or `None` if the action changes nothing; an error names the rule that the
    /// action breaks. With `repeat`, a message that arrives stays in flight.
    fn step(&self, state: &ModelState<W>, action: &Action, repeat: bool) -> Result<Option<ModelState<W>>, String> {
        match (action, state.place) {
            (Action::Begin, _) => Ok(self.machine.begin()?.map(|leap| self.leap(state, leap)).transpose()?),
            (Action::Take(message, luck), _) => self.take(state, message, *luck, repeat),
            (Action::Saga(happening), Some(place)) => {
                let mut next = state.clone();
                if let (Happening::Hear(message), false) = (happening, repeat) {
                    Arc::make_mut(&mut next.flying).remove(message);
                }
                match self.machine.happens(place, happening.clone())? {
                    Some(leap) => self.leap(&next, leap).map(Some),
                    None => Ok((next != *state).then_some(next)),
                }
            }
            (Action::Saga(_), None) => Ok(None),
        }
    }

    /// Returns the state with the saga at its new place and its commands in flight.
    fn leap(&self, state: &ModelState<W>, leap: Leap) -> Result<ModelState<W>, String> {
        let mut next = ModelState { place: Some(leap.to), ..state.clone() };
        let to = self.machine.place(leap.to);
        let moved = |place| self.machine.place(place).progress.definition != to.progress.definition;
        if state.place.is_some_and(moved) {
            Arc::make_mut(&mut next.ledger).moved_to(&self.machine.plan(&to.progress));
        }
        let flying = Arc::make_mut(&mut next.flying);
        for sent in leap.send {
            for other in flying.iter() {
                same_command(&sent, other)?;
            }
            flying.insert(sent);
        }
        self.forget(&mut next)?;
        Ok(next)
    }

    /// Drops the messages to which neither the saga nor a service reacts any more. If the barrier ignores a command
    /// now, the barrier will always ignore it. If a reply does not change the saga, the saga has received that reply
    /// before, or no longer waits for it. Of the commands of a step that the saga has left, only the command of the
    /// first attempt is kept, because the commands of later attempts would have the same effect.
    fn forget(&self, state: &mut ModelState<W>) -> Result<(), String> {
        let Some(number) = state.place else { return Ok(()) };
        let progress = &self.machine.place(number).progress;
        let present = |at: StepRef| at == progress.known_as() && progress.ended.is_none();
        // The messages are visited in descending order, so that the map keeps the first attempt.
        let attempts = state.flying.iter().rev().filter_map(|message| match &**message {
            ModelMessage::Command { at, call, attempt, .. } => Some(((*at, *call), *attempt)),
            ModelMessage::Reply { .. } => None,
        });
        let first: BTreeMap<_, _> = attempts.collect();
        let one_is_enough = self.troubles.messages_repeat;
        let useful = |message: &Arc<ModelMessage>| match &**message {
            ModelMessage::Reply { .. } => {
                Ok::<_, String>(self.machine.happens(number, Happening::Hear(message.clone()))?.is_some())
            }
            ModelMessage::Command { at, call, attempt, to, .. } => {
                let alike = one_is_enough && !present(*at) && first[&(*at, *call)] != *attempt;
                Ok(!alike && self.matters(state, number, message, to)?)
            }
        };
        let mut useless = Vec::new();
        for message in state.flying.iter() {
            if !useful(message)? {
                useless.push(message.clone());
            }
        }
        if !useless.is_empty() {
            Arc::make_mut(&mut state.flying).retain(|message| !useless.contains(message));
        }
        Ok(())
    }

    /// Returns whether a command can still have an effect, on the barrier or, through its reply, on the saga.
    fn matters(&self, state: &ModelState<W>, place: usize, message: &ModelMessage, to: &str) -> Result<bool, String> {
        let command = message.command();
        let Some(known) = state.services.get(to) else { return Ok(true) };
        let outcome = match decide_step(known, &command) {
            Step::Perform => return Ok(true),
            Step::Bar => match command.at {
                StepRef::Undo(step) if known.slot(StepRef::Forward(step), command.call) == Some(&StepState::Undone) => {
                    Outcome::Done(Value::Null)
                }
                _ => return Ok(true),
            },
            Step::Refuse => command.refused(TOO_LATE.to_owned()),
            Step::Repeat => state.ledger.answer(command.at, command.call)?,
        };
        Ok(self.machine.happens(place, Happening::Hear(Arc::new(ModelMessage::answer(&command, &outcome)?)))?.is_some())
    }

    /// Handles a command as `saga::participant::StepHandler` does.
    fn take(
        &self,
        state: &ModelState<W>,
        message: &Arc<ModelMessage>,
        luck: Luck,
        repeat: bool,
    ) -> Result<Option<ModelState<W>>, String> {
        let ModelMessage::Command { at, call, attempt, to, type_name, schema_version, data, .. } = &**message else {
            return Ok(None);
        };
        let mut next = state.clone();
        if !repeat {
            Arc::make_mut(&mut next.flying).remove(message);
        }
        let command = message.command();
        let known = state.services.get(to).cloned().unwrap_or_default();
        let outcome = match decide_step(&known, &command) {
            Step::Bar if luck == Luck::Does => Outcome::Done(Value::Null),
            Step::Refuse if luck == Luck::Does => command.refused(TOO_LATE.to_owned()),
            Step::Repeat if luck == Luck::Does => state.ledger.answer(*at, *call)?,
            Step::Bar | Step::Refuse | Step::Repeat => return Ok(None),
            Step::Perform => match luck {
                // A service that has done the step does not refuse it afterwards.
                Luck::Refuses if next.ledger.is_unheard(*at, *call) => return Ok(None),
                Luck::Refuses => command.refused("it says no".to_owned()),
                Luck::Fails => Outcome::Failed("not now".to_owned()),
                Luck::Does | Luck::Vanishes => {
                    let outcome = self.perform(&mut next, &command, to, (type_name, *schema_version, data))?;
                    match (luck, outcome) {
                        (Luck::Vanishes, Outcome::Done(reply)) => {
                            Arc::make_mut(&mut next.ledger).unheard(*at, *call, reply);
                            Outcome::Unknown("nobody knows".to_owned())
                        }
                        (_, outcome) => outcome,
                    }
                }
            },
        };
        let answer = ModelMessage::answer(&command, &outcome)?;
        Arc::make_mut(&mut next.ledger).answered(*at, *call, &outcome)?;
        let reply = Reply { at: *at, call: *call, attempt: *attempt, outcome };
        let replied = StepEvent::Replied { saga: String::new(), reply_to: String::new(), reply, passed: false };
        Arc::make_mut(&mut next.services).entry(to.clone()).or_default().evolve(&replied);
        let alike = |other: &Arc<ModelMessage>| {
            answer.is_failure() && other.is_failure() && other.command() == answer.command()
        };
        if !next.flying.iter().any(alike) {
            Arc::make_mut(&mut next.flying).insert(Arc::new(answer));
        }
        self.forget(&mut next)?;
        Ok((next != *state).then_some(next))
    }

    fn perform(
        &self,
        next: &mut ModelState<W>,
        command: &StepCommand,
        to: &str,
        (type_name, schema_version, data): (&str, i32, &str),
    ) -> Result<Outcome, String> {
        // An outside service that gets the same id again returns the same answer again.
        if next.ledger.is_unheard(command.at, command.call)
            && let Some(reply) = Arc::make_mut(&mut next.ledger).heard_now(command.at, command.call)
        {
            return Ok(Outcome::Done(reply));
        }
        let reply = match self.services.get(to) {
            None if self.services.is_empty() => Ok(Value::Null),
            None => return Err(format!("{type_name} goes to the service {to:?}, which the world does not have")),
            Some(act) => {
                let mut world = W::clone(&next.world);
                let reply = act(&mut world, type_name, schema_version, data)?;
                if reply.is_ok() {
                    next.world = Arc::new(world);
                }
                reply
            }
        };
        match reply {
            Ok(reply) => {
                let place =
                    next.place.map(|place| self.machine.place(place)).ok_or("a command came before its saga")?;
                let plan = self.machine.plan(&place.progress);
                Arc::make_mut(&mut next.ledger).perform(&plan, command.at, command.call)?;
                Ok(Outcome::Done(reply))
            }
            Err(StepError::Refused(reason)) => Ok(command.refused(reason)),
            Err(StepError::Failed(reason)) => Ok(Outcome::Failed(reason)),
            Err(StepError::Unknown(reason)) => Ok(Outcome::Unknown(reason)),
            Err(StepError::Store(error)) => Ok(Outcome::Failed(error.to_string())),
        }
    }

    /// Returns the rule or invariant that does not hold in `state`.
    pub fn fault(&self, state: &ModelState<W>) -> Option<String> {
        if let Some(broken) = &state.broken {
            return Some(broken.to_string());
        }
        if let Some((name, _)) = self.always.iter().find(|(_, holds)| !holds(&state.world)) {
            return Some(format!("broken: {name}"));
        }
        let place = self.machine.place(state.place?);
        let progress = &place.progress;
        if let Err(fault) = state.ledger.agrees(&self.machine.plan(progress)) {
            return Some(fault);
        }
        if progress.ended.is_some() {
            let broken = self.at_end.iter().find(|(_, holds)| !holds(&state.world, progress.status));
            return broken.map(|(name, _)| format!("broken at the end ({:?}): {name}", progress.status));
        }
        // If timers fire, a running saga always has a timer in the future, so the saga ends or gets stuck. Only if
        // timers never fire can a saga stop before its end.
        if !self.troubles.timers_fire && !place.is_stuck() && self.next_states(state).is_empty() {
            return Some(format!("nothing more happens, and the saga is still at {:?}", progress.step));
        }
        if place.is_stuck()
            && let Err(step) = self.ends_in_sunshine(state.clone())
        {
            let stuck = &progress.step;
            return Some(format!(
                "the saga is stuck at {stuck:?}; when an operator retries and all goes well from then on, it comes to {step:?} \
                 and does not end"
            ));
        }
        None
    }

    /// Checks that a stuck saga ends if an operator retries and no more faults happen. If the saga does not end, the
    /// error names the last step that it reaches. Replies that the saga has received are not sent again, because the
    /// saga must remember them.
    fn ends_in_sunshine(&self, mut state: ModelState<W>) -> Result<(), String> {
        let mut step = String::new();
        for _ in 0..SUNNY_MOVES_MAX {
            let Some(place) = state.place.map(|place| self.machine.place(place)) else { break };
            if place.progress.ended.is_some() {
                return Ok(());
            }
            step.clone_from(&place.progress.step);
            let messages = state.flying.iter().filter(|message| !message.is_failure());
            let mut moves = messages.map(|message| match **message {
                ModelMessage::Command { .. } => Action::Take(message.clone(), Luck::Does),
                ModelMessage::Reply { .. } => Action::Saga(Happening::Hear(message.clone())),
            });
            let happening = if place.is_stuck() { Happening::Retry } else { Happening::Timer };
            let action = moves.next().unwrap_or(Action::Saga(happening));
            match self.step(&state, &action, false) {
                Ok(Some(next)) => state = next,
                Ok(None) => break,
                // The checker makes the same move when it explores the states, and then reports the broken rule.
                Err(_) => return Ok(()),
            }
        }
        Err(step)
    }
}

/// Checks that all attempts at one call send the same command with the same id, and that different calls have
/// different ids.
fn same_command(sent: &ModelMessage, other: &ModelMessage) -> Result<(), String> {
    let ModelMessage::Command { at, call, id, to, type_name, schema_version, data, .. } = sent else { return Ok(()) };
    let ModelMessage::Command {
        at: other_at,
        call: other_call,
        id: other_id,
        to: other_to,
        type_name: other_type,
        schema_version: other_version,
        data: other_data,
        ..
    } = other
    else {
        return Ok(());
    };
    if (at, call) != (other_at, other_call) {
        return if id == other_id { Err(format!("{sent} has the id of {other}")) } else { Ok(()) };
    }
    if id != other_id {
        return Err(format!("{sent} has another id than the attempt before"));
    }
    let same = (to, type_name, schema_version, data) == (other_to, other_type, other_version, other_data);
    if same {
        return Ok(());
    }
    Err(format!(
        "{sent} is asked for again with other content: first {other_type} {other_data} to {other_to}, then {type_name} {data} \
         to {to}; a service carries out whichever comes first"
    ))
}

impl<C, W> Model for Protocol<C, W>
where
    C: SagaState,
    W: Clone + Debug + Eq + Hash + Send + Sync + 'static,
{
    type State = ModelState<W>;
    type Action = Action;

    fn init_states(&self) -> Vec<ModelState<W>> {
        vec![ModelState {
            place: None,
            flying: Arc::default(),
            services: Arc::default(),
            ledger: Arc::default(),
            world: Arc::new(self.world.clone()),
            broken: None,
        }]
    }

    fn actions(&self, state: &ModelState<W>, actions: &mut Vec<Action>) {
        if state.broken.is_some() {
            return;
        }
        let Some(place) = state.place else {
            actions.push(Action::Begin);
            return;
        };
        let place = self.machine.place(place);
        let progress = &place.progress;
        for message in state.flying.iter() {
            match &**message {
                ModelMessage::Reply { .. } => actions.push(Action::Saga(Happening::Hear(message.clone()))),
                ModelMessage::Command { .. } => {
                    actions.push(Action::Take(message.clone(), Luck::Does));
                    if self.troubles.steps_fail {
                        actions.push(Action::Take(message.clone(), Luck::Refuses));
                        actions.push(Action::Take(message.clone(), Luck::Fails));
                        actions.push(Action::Take(message.clone(), Luck::Vanishes));
                    }
                }
            }
        }
        if progress.due.is_some() && (self.troubles.timers_fire || progress.retrying) {
            actions.push(Action::Saga(Happening::Timer));
        }
        if progress.deadline.is_some() && self.troubles.timers_fire {
            actions.push(Action::Saga(Happening::Deadline));
        }
        if place.is_stuck() {
            actions.push(Action::Saga(Happening::Retry));
        }
        if self.machine.can_deploy(&place) {
            actions.push(Action::Saga(Happening::Deploy));
        }
    }

    fn next_state(&self, state: &ModelState<W>, action: Action) -> Option<ModelState<W>> {
        self.step(state, &action, self.troubles.messages_repeat)
            .unwrap_or_else(|broken| Some(ModelState { broken: Some(broken.into()), ..state.clone() }))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::always(RULES, |protocol: &Self, state: &ModelState<W>| protocol.fault(state).is_none())]
    }
}

/// The one property of the model: no rule and no invariant is broken.
pub(super) const RULES: &str = "rules";
