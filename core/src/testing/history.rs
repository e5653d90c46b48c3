//! A path through the state space, as numbered lines.

use std::{fmt::Debug, hash::Hash};

use super::{
    machine::Happening,
    model::{Action, Luck, Message, Protocol, State},
};
use crate::saga::{At, Outcome, SagaState, Status};

/// Returns one line for each move.
pub(super) fn tell<C, W>(protocol: &Protocol<C, W>, path: &[(State<W>, Option<Action>)]) -> Vec<String>
where
    C: SagaState,
    W: Clone + Debug + Eq + Hash + Send + Sync + 'static,
{
    let pairs = path.iter().zip(path.iter().skip(1));
    pairs.filter_map(|((before, action), (after, _))| Some(line(protocol, before, action.as_ref()?, after))).collect()
}

fn line<C, W>(protocol: &Protocol<C, W>, before: &State<W>, action: &Action, after: &State<W>) -> String
where
    C: SagaState,
    W: Clone + Debug + Eq + Hash + Send + Sync + 'static,
{
    let place = after.place.or(before.place).map(|place| protocol.machine.place(place));
    let name = |at: At| {
        let plan = place.as_ref().map(|place| protocol.machine.plan(&place.progress));
        plan.and_then(|plan| plan.place_of(at)).map_or("a step of the earlier plan", |(_, name)| name)
    };
    let what = |at: At| match at {
        At::Forward(_) | At::Closing(_) => format!("{:?}", name(at)),
        At::Undo(_) => format!("the undo of {:?}", name(at)),
    };
    let mut line = match action {
        Action::Begin => "the saga starts".to_owned(),
        Action::Take(message, luck) => match &**message {
            Message::Command { at, attempt, to, .. } => {
                let idle = after.broken.is_none() && before.ledger == after.ledger;
                let verb = match (luck, new_reply(before, after)) {
                    (Luck::Vanishes, _) => "does, without a reply,",
                    (Luck::Fails, _) | (Luck::Does, Some(Outcome::Failed(_))) => "fails with",
                    (Luck::Refuses, _) | (Luck::Does, Some(Outcome::Refused(_))) => "refuses",
                    (Luck::Does, _) if idle && matches!(at, At::Undo(_)) => "has nothing to undo for",
                    (Luck::Does, _) if idle => "refuses",
                    (Luck::Does, _) => "does",
                };
                let step = what(*at);
                format!("{to} {verb} {step} (attempt {attempt})")
            }
            Message::Reply { .. } => format!("{message}"),
        },
        Action::Saga(Happening::Hear(message)) => {
            let outcome = match &**message {
                Message::Reply { outcome, .. } if outcome.starts_with("{\"done\"") => "done",
                Message::Reply { outcome, .. } if outcome.starts_with("{\"refused\"") => "refused",
                Message::Reply { outcome, .. } if outcome.starts_with("{\"unknown\"") => "unknown",
                Message::Reply { .. } | Message::Command { .. } => "failed",
            };
            format!("the saga hears that {} is {outcome}", what(message.at()))
        }
        Action::Saga(Happening::Timer) => "the timer fires".to_owned(),
        Action::Saga(Happening::Deadline) => "the saga's deadline passes".to_owned(),
        Action::Saga(Happening::Deploy) => "the build with the next plan takes over".to_owned(),
        Action::Saga(Happening::Retry) => "an operator retries".to_owned(),
    };
    for asked in asked(protocol, before, action) {
        if let Message::Command { at, attempt, to, .. } = &*asked {
            line += &format!("; it asks {to} for {}", what(*at));
            if *attempt > 1 {
                line += &format!(" again (attempt {attempt})");
            }
        }
    }
    let status = |state: &State<W>| state.place.map(|place| protocol.machine.place(place).progress.clone());
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
fn new_reply<W>(before: &State<W>, after: &State<W>) -> Option<Outcome> {
    after.flying.difference(&before.flying).find_map(|message| match &**message {
        Message::Reply { outcome, .. } => serde_json::from_str(outcome).ok(),
        Message::Command { .. } => None,
    })
}

/// Returns the commands that the saga sent in this move.
fn asked<C, W>(protocol: &Protocol<C, W>, before: &State<W>, action: &Action) -> Vec<std::sync::Arc<Message>>
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
