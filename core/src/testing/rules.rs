//! The rules that every saga must satisfy, however its services behave.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::machine::Happening;
use crate::saga::{Command, Kind, Outcome, Progress, Saga, SagaState, Status, StepRef};

/// The actual effect of a call, tracked independently of the states that the saga and the services record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Effect {
    Done,
    Undone,
}

/// A plan, and the progress of a saga in that plan.
pub(super) struct PlanProgress<'a, C> {
    pub saga: &'a Saga<C>,
    pub progress: Progress,
}

impl<C> PlanProgress<'_, C> {
    fn steps(&self) -> impl Iterator<Item = (StepRef, &'static str)> {
        let saga = self.saga;
        let forward = saga.steps.iter().enumerate().map(|(place, step)| (StepRef::Forward(place), step.name));
        let closing = saga.closing.iter().enumerate().map(|(place, step)| (StepRef::Closing(place), step.name));
        forward.chain(closing)
    }

    /// Returns the step at a place of the plan, as the participants know the step.
    pub fn known_as(&self, at: StepRef) -> StepRef {
        let name = match at {
            StepRef::Forward(place) | StepRef::Undo(place) => self.saga.steps[place].name,
            StepRef::Closing(place) => self.saga.closing[place].name,
        };
        self.progress.number_of(at, name)
    }

    /// Returns the place and the name of a step in the plan, or `None` for a step that only an earlier plan has.
    pub fn place_of(&self, known_as: StepRef) -> Option<(StepRef, &'static str)> {
        let forward = if let StepRef::Undo(step) = known_as { StepRef::Forward(step) } else { known_as };
        let (at, name) = self.steps().find(|(at, _)| self.known_as(*at) == forward)?;
        match (known_as, at) {
            (StepRef::Undo(_), StepRef::Forward(place)) => Some((StepRef::Undo(place), name)),
            _ => Some((at, name)),
        }
    }
}

/// All effects of the saga.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Ledger {
    /// The effects of the calls. An undo is recorded under the step that it undoes.
    effects: BTreeMap<(StepRef, usize), Effect>,
    /// The replies, as JSON, to calls that were done with an unknown outcome.
    unheard: BTreeMap<(StepRef, usize), String>,
    /// The recorded outcomes, as JSON, of the steps that were done or refused. The service sends the same outcome again
    /// when the saga asks again.
    answers: BTreeMap<(StepRef, usize), String>,
    /// The steps that a migration added before the saga's place. The saga never carries out these steps.
    skipped: BTreeSet<&'static str>,
}

impl Ledger {
    /// Records that a call was done with an unknown outcome.
    pub fn unheard(&mut self, at: StepRef, call: usize, reply: Value) {
        self.unheard.insert((at, call), reply.to_string());
    }

    pub fn is_unheard(&self, at: StepRef, call: usize) -> bool {
        self.unheard.contains_key(&(at, call))
    }

    /// Removes and returns the reply to a call that was done with an unknown outcome. This function is called when a
    /// later attempt learns the outcome.
    pub fn heard_now(&mut self, at: StepRef, call: usize) -> Option<Value> {
        self.unheard.remove(&(at, call)).and_then(|reply| reply.parse().ok())
    }

    /// Records that the saga follows this plan from now on.
    pub fn moved_to<C>(&mut self, plan: &PlanProgress<'_, C>) {
        let place = match plan.progress.at {
            StepRef::Forward(place) | StepRef::Undo(place) => place,
            StepRef::Closing(_) => plan.saga.steps.len(),
        };
        let new = |(at, _): &(StepRef, _)| {
            matches!(at, StepRef::Forward(step) if *step < place)
                && !self.effects.keys().any(|(known, _)| *known == plan.known_as(*at))
        };
        let skipped: Vec<_> = plan.steps().filter(new).map(|(_, name)| name).collect();
        self.skipped.extend(skipped);
    }

    /// Records an outcome, so that the service can send it again.
    pub fn answered(&mut self, at: StepRef, call: usize, outcome: &Outcome) -> Result<(), String> {
        if !matches!(at, StepRef::Undo(_)) && matches!(outcome, Outcome::Done(_) | Outcome::Refused(_)) {
            let outcome = serde_json::to_string(outcome).map_err(|error| error.to_string())?;
            self.answers.entry((at, call)).or_insert(outcome);
        }
        Ok(())
    }

    /// Returns the recorded outcome of a step that was done or refused.
    pub fn answer(&self, at: StepRef, call: usize) -> Result<Outcome, String> {
        let recorded = self.answers.get(&(at, call)).ok_or_else(|| format!("no answer is recorded for {at}/{call}"))?;
        serde_json::from_str(recorded).map_err(|error| error.to_string())
    }

    fn is(&self, at: StepRef, call: usize, effect: Effect) -> bool {
        self.effects.get(&(at, call)) == Some(&effect)
    }

    /// Records that a service carried out a call of the step that the service knows as `known_as`. Returns an error if
    /// this breaks a rule.
    pub fn perform<C: SagaState>(
        &mut self,
        plan: &PlanProgress<'_, C>,
        known_as: StepRef,
        call: usize,
    ) -> Result<(), String> {
        let Some((at, name)) = plan.place_of(known_as) else {
            return Err(format!("{known_as} is done, but the plan does not have the step"));
        };
        if let StepRef::Undo(step) = at {
            if let Some((after, _)) = self.any(plan, step + 1.., Effect::Done) {
                return Err(format!("{name:?} is undone while {after:?}, which came after it, is still done"));
            }
            return match self.effects.insert((plan.known_as(StepRef::Forward(step)), call), Effect::Undone) {
                Some(Effect::Done) => Ok(()),
                Some(Effect::Undone) => Err(format!("{name:?} is undone twice")),
                None => Err(format!("{name:?} is undone but was never done")),
            };
        }
        match self.effects.insert((known_as, call), Effect::Done) {
            None => {}
            Some(Effect::Done) => return Err(format!("{name:?} is done twice")),
            Some(Effect::Undone) => return Err(format!("{name:?} is done after it was undone")),
        }
        match at {
            StepRef::Closing(step) => {
                if let Some((left, _)) = self.any(plan, 0.., Effect::Done) {
                    return Err(format!("{name:?} ends a compensated saga while {left:?} is still done"));
                }
                let is_done = |before| self.is(plan.known_as(StepRef::Closing(before)), 0, Effect::Done);
                match (0..step).find(|before| !is_done(*before)) {
                    Some(before) => Err(format!("{name:?} is done before {:?}", plan.saga.closing[before].name)),
                    None => Ok(()),
                }
            }
            StepRef::Forward(step) | StepRef::Undo(step) => match self.missing(plan, step) {
                Some(before) => Err(format!("{name:?} is done while {before:?}, which comes before it, is not done")),
                None => Ok(()),
            },
        }
    }

    /// Returns a step in `range` with a call in the state `effect`.
    fn any<C>(
        &self,
        plan: &PlanProgress<'_, C>,
        range: std::ops::RangeFrom<usize>,
        effect: Effect,
    ) -> Option<(&'static str, Kind)> {
        let steps = plan.saga.steps.iter().enumerate().skip(range.start);
        let has = |step: usize, call: usize| self.is(plan.known_as(StepRef::Forward(step)), call, effect);
        let mut found = steps.filter(|(step, planned)| (0..planned.calls.len()).any(|call| has(*step, call)));
        found.next().map(|(_, planned)| (planned.name, planned.kind))
    }

    /// Returns the name of the first step, among the first `steps` steps, that has a call that was not done.
    fn missing<C>(&self, plan: &PlanProgress<'_, C>, steps: usize) -> Option<&'static str> {
        let mut all = plan.saga.steps.iter().enumerate().take(steps);
        let is_done = |step: usize, call: usize| self.is(plan.known_as(StepRef::Forward(step)), call, Effect::Done);
        let lacks = |step: usize, calls: usize| (0..calls).any(|call| !is_done(step, call));
        let missing =
            all.find(|(step, planned)| !self.skipped.contains(planned.name) && lacks(*step, planned.calls.len()));
        missing.map(|(_, planned)| planned.name)
    }

    /// Checks the rules that apply to a saga with this progress.
    pub fn agrees<C>(&self, plan: &PlanProgress<'_, C>) -> Result<(), String> {
        let saga = plan.saga;
        let decided = saga.steps.iter().enumerate().find(|(step, planned)| {
            planned.kind != Kind::Compensatable && self.is(plan.known_as(StepRef::Forward(*step)), 0, Effect::Done)
        });
        match plan.progress.status {
            Status::Completed => match self.missing(plan, saga.steps.len()) {
                Some(step) => Err(format!("the saga completed, but {step:?} is not done")),
                None => Ok(()),
            },
            Status::Compensated => {
                let left = |((at, _), effect): (&(StepRef, usize), &Effect)| {
                    matches!((at, effect), (StepRef::Forward(_), Effect::Done)).then_some(*at)
                };
                if let Some(at) = self.effects.iter().find_map(left) {
                    let step = plan.place_of(at).map_or("a step of the earlier plan", |(_, name)| name);
                    return Err(format!("the saga was compensated, but {step:?} is still done"));
                }
                let is_done = |step| self.is(plan.known_as(StepRef::Closing(step)), 0, Effect::Done);
                match (0..saga.closing.len()).find(|step| !is_done(*step)) {
                    Some(step) => {
                        Err(format!("the saga was compensated, but {:?} is not done", saga.closing[step].name))
                    }
                    None => Ok(()),
                }
            }
            Status::Compensating => match decided {
                Some((_, planned)) => Err(format!("the saga goes back although {:?} is done", planned.name)),
                None => Ok(()),
            },
            Status::Running | Status::Stuck => Ok(()),
        }
    }
}

/// Returns a description of the saga's place in its plan.
pub(super) fn place(progress: &Progress) -> String {
    match (progress.ended, progress.at) {
        (Some(_), _) => format!("that has ended {:?}", progress.status),
        (None, StepRef::Undo(_)) => format!("that is undoing {:?}", progress.step),
        (None, StepRef::Forward(_) | StepRef::Closing(_)) => format!("that is at {:?}", progress.step),
    }
}

/// Checks the rules for a move from one place to the next.
pub(super) fn moved<C>(saga: &Saga<C>, from: &Progress, happening: &Happening, to: &Progress) -> Result<(), String> {
    if from.ended.is_some() {
        return Err(format!("{happening:?} moves a saga {}", place(from)));
    }
    if !matches!(from.at, StepRef::Forward(_)) && matches!(to.at, StepRef::Forward(_)) {
        return Err(format!("the saga was going back and goes forward again to {:?}", to.step));
    }
    let ended = to.ended.is_some();
    if ended != to.status.has_ended() {
        return Err(format!("a saga that is {:?} says ended: {ended}", to.status));
    }
    let may_stick = match to.at {
        StepRef::Forward(step) => saga.steps[step].kind != Kind::Compensatable,
        StepRef::Undo(_) | StepRef::Closing(_) => true,
    };
    if to.status == Status::Stuck && !may_stick {
        return Err(format!("the saga is stuck at {:?}, which can be undone", to.step));
    }
    if to.is_stuck_but_answered() {
        return Err(format!("the saga is stuck at {:?}, although the step is answered", to.step));
    }
    let matching = match to.status {
        Status::Running => matches!(to.at, StepRef::Forward(_)),
        Status::Compensating => !matches!(to.at, StepRef::Forward(_)),
        Status::Completed | Status::Compensated | Status::Stuck => true,
    };
    if !matching {
        return Err(format!("a saga that is {:?} stands at {}", to.status, to.at));
    }
    Ok(())
}

/// Checks that a running or compensating saga has a timer in the future; without a timer, a lost message would halt the
/// saga for good. Checks that any other saga has no timer and sends no command.
pub(super) fn timers(progress: &Progress, sent: &[Command], now: i64) -> Result<(), String> {
    let at = place(progress);
    if matches!(progress.status, Status::Running | Status::Compensating) {
        return match progress.due {
            Some(due) if due > now => Ok(()),
            Some(_) => Err(format!("the timer of a saga {at} is set in the past: it would fire again and again")),
            None => Err(format!("a saga {at} has no timer: after a lost message the saga would wait forever")),
        };
    }
    match (progress.wakes(), sent) {
        (None, []) => Ok(()),
        (Some(_), _) => Err(format!("a saga {at} ({:?}) still has a timer", progress.status)),
        (None, _) => Err(format!("a saga {at} ({:?}) still sends a command", progress.status)),
    }
}
