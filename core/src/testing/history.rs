//! A path through the state space, as numbered lines.

use std::{fmt::Debug, hash::Hash};

use super::{
    machine::Happening,
    model::{Action, Luck, ModelMessage, ModelState, Protocol},
};
use crate::saga::{Outcome, SagaState, Status, StepRef};

/// Returns one line for each move.
pub(super) fn tell<C, W>(protocol: &Protocol<C, W>, path: &[(ModelState<W>, Option<Action>)]) -> Vec<String>
where
    C: SagaState,
    W: Clone + Debug + Eq + Hash + Send + Sync + 'static,
{
    let pairs = path.iter().zip(path.iter().skip(1));
    pairs.filter_map(|((before, action), (after, _))| Some(line(protocol, before, action.as_ref()?, after))).collect()
}

fn line<C, W>(protocol: &Protocol<C, W>, before: &ModelState<W>, action: &Action, after: &ModelState<W>) -> String
where
    C: SagaState,
    W: Clone + Debug + Eq + Hash + Send + Sync + 'static,
{
    let place = after.place.or(before.place).map(|place| protocol.machine.place(place));
    let name = |at: StepRef| {
        let plan = place.as_ref().map(|place| protocol.machine.plan(&place.progress));
        plan.and_then(|plan| plan.place_of(at)).map_or("a step of the earlier plan", |(_, name)| name)
    };
    let what = |at: StepRef| match at {
        StepRef::Forward(_) | StepRef::Closing(_) => format!("{:?}", name(at)),
        StepRef::Undo(_) => format!("the undo of {:?}", name(at)),
    };
    let mut line = match action {
        Action::Begin => "the saga starts".to_owned(),
        Action::Take(message, luck) => match &**message {
            ModelMessage::Command { at, attempt, to, .. } => {
                let idle = after.broken.is_none() && before.ledger == after.ledger;
                let verb = match (luck, new_reply(before, after)) {
                    (Luck::Vanishes, _) => "does, without a reply,",
                    (Luck::Fails, _) | (Luck::Does, Some(Outcome::Failed(_))) => "fails with",
                    (Luck::Refuses, _) | (Luck::Does, Some(Outcome::Refused(_))) => "refuses",
                    (Luck::Does, _) if idle && matches!(at, StepRef::Undo(_)) => "has nothing to undo for",
                    (Luck::Does, _) if idle => "refuses",
                    (Luck::Does, _) => "does",
                };
                let step = what(*at);
                format!("{to} {verb} {step} (attempt {attempt})")
            }
            ModelMessage::Reply { .. } => format!("{message}"),
        },
        Action::Saga(Happening::Hear(message)) => {
            let outcome = match &**message {
                ModelMessage::Reply { outcome, .. } if outcome.starts_with("{\"done\"") => "done",
                ModelMessage::Reply { outcome, .. } if outcome.starts_with("{\"refused\"") => "refused",
                ModelMessage::Reply { outcome, .. } if outcome.starts_with("{\"unknown\"") => "unknown",
                ModelMessage::Reply { .. } | ModelMessage::Command { .. } => "failed",
            };
            format!("the saga hears that {} is {outcome}", what(message.at()))
        }
        Action::Saga(Happening::Timer) => "the timer fires".to_owned(),
        Action::Saga(Happening::Deadline) => "the saga's deadline passes".to_owned(),
        Action::Saga(Happening::Deploy) => "the build with the next plan takes over".to_owned(),
        Action::Saga(Happening::Retry) => "an operator retries".to_owned(),
    };
    for asked in asked(protocol, before, action) {
        if let ModelMessage::Command { at, attempt, to, .. } = &*asked {
            line += &format!("; it asks {to} for {}", what(*at));
            if *attempt > 1 {
                line += &format!(" again (attempt {attempt})");
            }
        }
    }
    let status = |state: &ModelState<W>| state.place.map(|place| protocol.machine.place(place).progress.clone());
    if let (was, Some(is)) = (status(before), status(after))
        && was.as_ref().map(|was| was.status) != Some(is.status)
        && is.status != Status::Running
    {
        line += match is.status {
            Status::Running => "",
            Status::Compensating => "; it goes back",
            Status::Completed => "; it has completed",
            Status::Compensated => "; it is compensated",
            Status::Stuck => "; it is stuck",
        };
    }
    if after.world != before.world {
        line += &format!("\n       world: {:?}", after.world);
    }
    line
}

/// Returns the reply that a service sent in this move.
fn new_reply<W>(before: &ModelState<W>, after: &ModelState<W>) -> Option<Outcome> {
    after.flying.difference(&before.flying).find_map(|message| match &**message {
        ModelMessage::Reply { outcome, .. } => serde_json::from_str(outcome).ok(),
        ModelMessage::Command { .. } => None,
    })
}

/// Returns the commands that the saga sent in this move.
fn asked<C, W>(protocol: &Protocol<C, W>, before: &ModelState<W>, action: &Action) -> Vec<std::sync::Arc<ModelMessage>>
where
    C: SagaState,
{
    let leap = match (action, before.place) {
        (Action::Begin, _) => protocol.machine.begin(),
        (Action::Saga(happening), Some(place)) => protocol.machine.happens(place, happening.clone()),
        (Action::Saga(_), None) | (Action::Take(..), _) => return Vec::new(),
    };
    leap.ok().flatten().map(|leap| leap.send).unwrap_or_default()
}
