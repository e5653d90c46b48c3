//! What must hold for every saga, whatever its services do.

use std::collections::BTreeMap;

use serde_json::Value;

use super::machine::Happening;
use crate::saga::{At, Command, Kind, Outcome, Progress, Saga, SagaState, Status};

/// What really became of a call, kept apart from what the saga and the services believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Effect {
    Done,
    Undone,
}

/// Every effect of the saga.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Ledger {
    /// An undo counts for the step it takes back.
    effects: BTreeMap<(At, usize), Effect>,
    /// The replies, as JSON, to calls that were done without anybody knowing.
    unheard: BTreeMap<(At, usize), String>,
    /// The recorded outcomes, as JSON, of the steps that were done or refused: they are given again.
    answers: BTreeMap<(At, usize), String>,
}

impl Ledger {
    /// Notes that a call was done without anybody knowing.
    pub fn unheard(&mut self, at: At, call: usize, reply: Value) {
        self.unheard.insert((at, call), reply.to_string());
    }

    pub fn is_unheard(&self, at: At, call: usize) -> bool {
        self.unheard.contains_key(&(at, call))
    }

    /// The reply to a call that was done without anybody knowing, now that somebody gets to know.
    pub fn heard_now(&mut self, at: At, call: usize) -> Option<Value> {
        self.unheard.remove(&(at, call)).and_then(|reply| reply.parse().ok())
    }

    /// Records an outcome that is given again.
    pub fn answered(&mut self, at: At, call: usize, outcome: &Outcome) -> Result<(), String> {
        if !matches!(at, At::Undo(_)) && matches!(outcome, Outcome::Done(_) | Outcome::Refused(_)) {
            let outcome = serde_json::to_string(outcome).map_err(|error| error.to_string())?;
            self.answers.entry((at, call)).or_insert(outcome);
        }
        Ok(())
    }

    /// The recorded outcome of a step that was done or refused.
    pub fn answer(&self, at: At, call: usize) -> Result<Outcome, String> {
        let recorded = self.answers.get(&(at, call)).ok_or_else(|| format!("no answer is recorded for {at}/{call}"))?;
        serde_json::from_str(recorded).map_err(|error| error.to_string())
    }

    fn is(&self, at: At, call: usize, effect: Effect) -> bool {
        self.effects.get(&(at, call)) == Some(&effect)
    }

    /// Notes that a service carried out a call; `Err` if it must not have.
    pub fn perform<C: SagaState>(&mut self, saga: &Saga<C>, at: At, call: usize) -> Result<(), String> {
        let name = match at {
            At::Forward(step) | At::Undo(step) => saga.steps[step].name,
            At::Closing(step) => saga.closing[step].name,
        };
        if let At::Undo(step) = at {
            let forward = At::Forward(step);
            if let Some((after, _)) = self.any(saga, step + 1.., Effect::Done) {
                return Err(format!("{name:?} is undone while {after:?}, which came after it, is still done"));
            }
            return match self.effects.insert((forward, call), Effect::Undone) {
                Some(Effect::Done) => Ok(()),
                Some(Effect::Undone) => Err(format!("{name:?} is undone twice")),
                None => Err(format!("{name:?} is undone but was never done")),
            };
        }
        match self.effects.insert((at, call), Effect::Done) {
            None => {}
            Some(Effect::Done) => return Err(format!("{name:?} is done twice")),
            Some(Effect::Undone) => return Err(format!("{name:?} is done after it was undone")),
        }
        match at {
            At::Closing(step) => {
                if let Some((left, _)) = self.any(saga, 0.., Effect::Done) {
                    return Err(format!("{name:?} ends a compensated saga while {left:?} is still done"));
                }
                match (0..step).find(|before| !self.is(At::Closing(*before), 0, Effect::Done)) {
                    Some(before) => Err(format!("{name:?} is done before {:?}", saga.closing[before].name)),
                    None => Ok(()),
                }
            }
            At::Forward(step) | At::Undo(step) => match self.missing(saga, step) {
                Some(before) => Err(format!("{name:?} is done while {before:?}, which comes before it, is not done")),
                None => Ok(()),
            },
        }
    }

    /// A step in `range` with a call in the state `effect`.
    fn any<C>(
        &self,
        saga: &Saga<C>,
        range: std::ops::RangeFrom<usize>,
        effect: Effect,
    ) -> Option<(&'static str, Kind)> {
        let steps = saga.steps.iter().enumerate().skip(range.start);
        let mut found = steps
            .filter(|(step, planned)| (0..planned.calls.len()).any(|call| self.is(At::Forward(*step), call, effect)));
        found.next().map(|(_, planned)| (planned.name, planned.kind))
    }

    /// A step among the first `steps` that is not wholly done.
    fn missing<C>(&self, saga: &Saga<C>, steps: usize) -> Option<&'static str> {
        let mut all = saga.steps.iter().enumerate().take(steps);
        let lacks = |step: usize, calls: usize| (0..calls).any(|call| !self.is(At::Forward(step), call, Effect::Done));
        all.find(|(step, planned)| lacks(*step, planned.calls.len())).map(|(_, planned)| planned.name)
    }

    /// What must hold whenever a saga has this progress.
    pub fn agrees<C>(&self, saga: &Saga<C>, progress: &Progress) -> Result<(), String> {
        let decided = saga.steps.iter().enumerate().find(|(step, planned)| {
            planned.kind != Kind::Compensatable && self.is(At::Forward(*step), 0, Effect::Done)
        });
        match progress.status {
            Status::Completed => match self.missing(saga, saga.steps.len()) {
                Some(step) => Err(format!("the saga completed, but {step:?} is not done")),
                None => Ok(()),
            },
            Status::Compensated => {
                if let Some((step, _)) = self.any(saga, 0.., Effect::Done) {
                    return Err(format!("the saga was compensated, but {step:?} is still done"));
                }
                let undone = (0..saga.closing.len()).find(|step| !self.is(At::Closing(*step), 0, Effect::Done));
                match undone {
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

/// Where a saga stands, in words.
pub(super) fn place(progress: &Progress) -> String {
    match (progress.ended, progress.at) {
        (Some(_), _) => format!("that has ended {:?}", progress.status),
        (None, At::Undo(_)) => format!("that is undoing {:?}", progress.step),
        (None, At::Forward(_) | At::Closing(_)) => format!("that is at {:?}", progress.step),
    }
}

/// What holds between two places in a row.
pub(super) fn moved<C>(saga: &Saga<C>, from: &Progress, happening: &Happening, to: &Progress) -> Result<(), String> {
    if from.ended.is_some() {
        return Err(format!("{happening:?} moves a saga {}", place(from)));
    }
    if !matches!(from.at, At::Forward(_)) && matches!(to.at, At::Forward(_)) {
        return Err(format!("the saga was going back and goes forward again to {:?}", to.step));
    }
    let ended = to.ended.is_some();
    if ended != to.status.has_ended() {
        return Err(format!("a saga that is {:?} says ended: {ended}", to.status));
    }
    let may_stick = match to.at {
        At::Forward(step) => saga.steps[step].kind != Kind::Compensatable,
        At::Undo(_) | At::Closing(_) => true,
    };
    if to.status == Status::Stuck && !may_stick {
        return Err(format!("the saga is stuck at {:?}, which can be undone", to.step));
    }
    let matching = match to.status {
        Status::Running => matches!(to.at, At::Forward(_)),
        Status::Compensating => !matches!(to.at, At::Forward(_)),
        Status::Completed | Status::Compensated | Status::Stuck => true,
    };
    if !matching {
        return Err(format!("a saga that is {:?} stands at {}", to.status, to.at));
    }
    Ok(())
}

/// A saga that goes on by itself has a timer ahead of it, or a lost message would be the end of it. One that does not,
/// has none, and asks nothing.
pub(super) fn timers(progress: &Progress, sent: &[Command], now: i64) -> Result<(), String> {
    let at = place(progress);
    if matches!(progress.status, Status::Running | Status::Compensating) {
        return match progress.due {
            Some(due) if due > now => Ok(()),
            Some(_) => Err(format!("the timer of a saga {at} is set in the past: it would fire over and over")),
            None => Err(format!("a saga {at} has no timer: a lost message would be its end")),
        };
    }
    match (progress.wakes(), sent) {
        (None, []) => Ok(()),
        (Some(_), _) => Err(format!("a saga {at} ({:?}) still has a timer", progress.status)),
        (None, _) => Err(format!("a saga {at} ({:?}) still asks for something", progress.status)),
    }
}
