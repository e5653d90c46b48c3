//! Moves a saga to another plan, or refuses the move if a step would be repeated or left without its undo.

use std::{collections::BTreeMap, mem::discriminant, sync::Arc};

use super::{
    definition::{Kind, PlannedStep, Saga, SagaState},
    progress::{Progress, StepRef},
};
use crate::base::panic::caught_now;

/// The steps that a saga has reached, in order.
pub(super) type Trail = Vec<ReachedStep>;

/// A step that a saga has reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ReachedStep {
    /// The step, with the number that its participants know, which may differ from its place in the plan.
    pub(super) at: StepRef,
    pub(super) name: Arc<str>,
    /// The number of participants that were asked.
    pub(super) calls: usize,
}

impl<C> Saga<C> {
    /// Returns the step at a place, if the plan has that place.
    pub(super) fn planned(&self, at: StepRef) -> Option<&PlannedStep<C>> {
        match at {
            StepRef::Forward(step) => self.steps.get(step),
            StepRef::Undo(step) => self.steps.get(step).filter(|step| step.kind == Kind::Compensatable),
            StepRef::Closing(step) => self.closing.get(step),
        }
    }

    /// Returns whether this plan has the current step of a saga with this progress, with the same number of
    /// participants.
    pub(super) fn has(&self, progress: &Progress) -> bool {
        self.planned(progress.at).is_some_and(|step| step.calls.len() == progress.calls.len())
    }
}

/// Returns the progress of a saga in `plan`, as `migrate` computes it.
///
/// # Errors
/// Returns the reason why the saga cannot continue at the place that `migrate` returns.
pub(super) fn migrated<C: SagaState>(
    migrate: fn(&Progress) -> Progress,
    from: &Progress,
    trail: &Trail,
    plan: &Saga<C>,
) -> Result<Progress, String> {
    let moved = caught_now(|| migrate(from)).map_err(|panic| format!("the migration {panic}"))?;
    let at = moved.at;
    let planned = plan.planned(at).ok_or_else(|| format!("the plan has no step at {at}"))?;
    let name = planned.name;
    if discriminant(&at) != discriminant(&from.at) || (moved.status, moved.ended) != (from.status, from.ended) {
        return Err(format!(
            "the saga is {:?} at {}, and a migration cannot change the saga to {:?} at {at}",
            from.status, from.at, moved.status
        ));
    }
    if name != from.step || moved.step != from.step {
        return Err(format!("the saga waits at step {:?}, but {at} of the plan is step {name:?}", from.step));
    }
    if moved.calls != from.calls || planned.calls.len() != from.calls.len() {
        return Err(format!(
            "step {name:?} was requested from {} participants, but has {} in the plan",
            from.calls.len(),
            planned.calls.len()
        ));
    }
    keeps_what_was_asked(from, at, trail, plan)?;
    Ok(Progress { definition: plan.hash.clone(), numbers: numbers(trail, plan), ..moved })
}

/// Checks that a saga that continues at `at` neither repeats a step nor leaves a step without its undo.
fn keeps_what_was_asked<C>(from: &Progress, at: StepRef, trail: &Trail, plan: &Saga<C>) -> Result<(), String> {
    let asked = |is: fn(&StepRef) -> bool| trail.iter().filter(move |reached| is(&reached.at));
    let forward = || asked(|at| matches!(at, StepRef::Forward(_)));
    let place_of = |steps: &[PlannedStep<C>], name: &str| steps.iter().position(|step| step.name == name);
    let again = |name: &str| Err(format!("step {name:?} is done, and would be requested again"));
    match at {
        StepRef::Forward(step) => {
            for reached in forward().filter(|reached| *reached.name != *from.step) {
                let name = &reached.name;
                match place_of(&plan.steps, name) {
                    None => return Err(format!("step {name:?} was requested, but the plan does not have the step")),
                    Some(place) if place > step => return again(name),
                    Some(place) => undoes_all(reached, &plan.steps[place])?,
                }
            }
            let passed_over = |step: &&PlannedStep<C>| {
                step.kind == Kind::Pivot && !forward().any(|reached| *reached.name == *step.name)
            };
            match plan.steps[..step].iter().find(passed_over) {
                Some(pivot) => Err(format!("step {:?} is the pivot, and would be skipped", pivot.name)),
                None => Ok(()),
            }
        }
        StepRef::Undo(step) => {
            let undone = || asked(|at| matches!(at, StepRef::Undo(_)));
            // The saga went back from its last step. If that step has no undo in progress, its participant refused it,
            // so there is nothing to undo.
            let turned_at = forward().next_back().map(|reached| &reached.name);
            for reached in forward().filter(|reached| !undone().any(|undone| undone.name == reached.name)) {
                let name = &reached.name;
                if turned_at == Some(name) {
                    continue;
                }
                match place_of(&plan.steps, name).map(|place| (place, &plan.steps[place])) {
                    Some((place, planned)) if planned.kind == Kind::Compensatable => {
                        if place >= step {
                            return Err(format!("step {name:?} would not be undone"));
                        }
                        undoes_all(reached, planned)?;
                    }
                    _ => return Err(format!("step {name:?} was requested, but the plan has no undo of the step")),
                }
            }
            Ok(())
        }
        StepRef::Closing(step) => {
            let mut closed = asked(|at| matches!(at, StepRef::Closing(_)));
            let twice = closed.find(|reached| {
                *reached.name != *from.step && place_of(&plan.closing, &reached.name).is_some_and(|place| place > step)
            });
            twice.map_or(Ok(()), |reached| again(&reached.name))
        }
    }
}

/// Checks that the undo of a step reaches every participant that was asked to carry out the step.
fn undoes_all<C>(reached: &ReachedStep, planned: &PlannedStep<C>) -> Result<(), String> {
    let asked = reached.calls;
    let of_plan = planned.calls.len();
    // A participant that the plan adds was never asked, and has nothing to undo.
    if planned.kind != Kind::Compensatable || asked <= of_plan {
        return Ok(());
    }
    Err(format!("step {:?} was requested from {asked} participants, but has {of_plan} in the plan", planned.name))
}

/// Returns the numbers under which participants know the plan's steps. A step that was already requested keeps its
/// number even if its place changes. Every other step gets an unused number. The map is empty if the number of every
/// step equals its place.
fn numbers<C>(trail: &Trail, plan: &Saga<C>) -> BTreeMap<String, usize> {
    let forward = trail.iter().filter_map(|ReachedStep { at, name, .. }| match at {
        StepRef::Forward(number) => Some((&**name, *number)),
        StepRef::Undo(_) | StepRef::Closing(_) => None,
    });
    let closing = trail.iter().filter_map(|ReachedStep { at, name, .. }| match at {
        StepRef::Closing(number) => Some((&**name, *number)),
        StepRef::Forward(_) | StepRef::Undo(_) => None,
    });
    let mut numbers = numbered(&plan.steps, forward.collect());
    numbers.extend(numbered(&plan.closing, closing.collect()));
    let all = plan.steps.iter().enumerate().chain(plan.closing.iter().enumerate());
    let is_place = |(place, step): (usize, &PlannedStep<C>)| numbers.get(step.name) == Some(&place);
    if all.into_iter().all(is_place) { BTreeMap::new() } else { numbers }
}

fn numbered<C>(steps: &[PlannedStep<C>], asked: BTreeMap<&str, usize>) -> BTreeMap<String, usize> {
    let mut free = asked.values().copied().max().map_or(0, |last| last + 1).max(steps.len());
    let mut number = |(place, step): (usize, &PlannedStep<C>)| {
        let number = match asked.get(step.name) {
            Some(number) => *number,
            None if asked.values().any(|number| *number == place) => {
                free += 1;
                free - 1
            }
            None => place,
        };
        (step.name.to_owned(), number)
    };
    steps.iter().enumerate().map(&mut number).collect()
}
