//! Checks that the history of each saga is possible, as far as this is certain without the saga's definition.

use std::collections::HashMap;

use annals::{
    Recorded,
    saga::{OperatorAction, Progress, SagaEvent, Status, StepRef},
};

use super::{event::place, faults::Faults};
use crate::{failure::Failure, stream_key::stream_key};

/// The sagas seen so far. A saga that has not ended has its progress here; a saga that has ended has `None`.
#[derive(Default)]
pub(super) struct Histories {
    sagas: HashMap<u128, Option<Box<Progress>>>,
}

impl Histories {
    pub fn event(&mut self, event: &Recorded, faults: &mut Faults<'_>) -> Result<(), Failure> {
        if !event.stream.category().starts_with("saga.") {
            return Ok(());
        }
        let decoded = match event.decode::<SagaEvent>() {
            Ok(Some(decoded)) => decoded,
            Ok(None) => return Ok(()),
            Err(error) => {
                return faults.add(place(event), format!("the event is not a valid saga event: {}", error.source));
            }
        };
        let key = stream_key(event.stream.as_str());
        let wrong = match self.sagas.get(&key) {
            None => begins(&decoded),
            Some(None) => Some("the saga had ended before".to_owned()),
            Some(Some(before)) => follows(before, &decoded),
        };
        let progress = decoded.progress();
        let live = progress.ended.is_none().then(|| Box::new(progress.clone()));
        self.sagas.insert(key, live);
        wrong.map_or(Ok(()), |wrong| faults.add(place(event), wrong))
    }

    pub fn len(&self) -> usize {
        self.sagas.len()
    }

    /// Returns whether the saga with this stream has ended; `None` if there is no such saga.
    pub fn has_ended(&self, stream: &str) -> Option<bool> {
        self.sagas.get(&stream_key(stream)).map(Option::is_none)
    }
}

/// Returns what is wrong with the first event of a saga, if anything.
fn begins(event: &SagaEvent) -> Option<String> {
    match event {
        SagaEvent::Started { .. } => commands(event),
        _ => Some("the history does not begin with saga.started".into()),
    }
}

/// Returns what is wrong with an event that follows this progress, if anything.
fn follows(before: &Progress, event: &SagaEvent) -> Option<String> {
    let after = event.progress();
    let changed = |what: &str| Some(format!("{what} changed"));
    let migrated = matches!(event, SagaEvent::Migrated { .. });
    if matches!(event, SagaEvent::Started { .. }) {
        return Some("the saga had been started before".into());
    }
    if after.started != before.started {
        return changed("the start time");
    }
    if after.definition != before.definition && !migrated {
        return changed("the definition");
    }
    if !migrated && rank(after.at) < rank(before.at) {
        return Some(format!("the saga went from {} back to {}", before.at, after.at));
    }
    let possible = match (before.status, after.status) {
        (Status::Compensating, Status::Running | Status::Completed) => false,
        (Status::Completed | Status::Compensated, _) => false,
        (Status::Stuck, status) if status != Status::Stuck => matches!(event, SagaEvent::Operated { .. }),
        _ => true,
    };
    if !possible && !migrated {
        return Some(format!("the status changed from {:?} to {:?}", before.status, after.status));
    }
    let abandoned = matches!(event, SagaEvent::Operated { verb: OperatorAction::Abandon, .. });
    if after.ended.is_some() != (after.status.has_ended() || abandoned) {
        return Some(format!(
            "the status is {:?}, and the saga has {}ended",
            after.status,
            if after.ended.is_some() { "" } else { "not " }
        ));
    }
    match event {
        SagaEvent::Replied { reply, .. } if reply.at != before.known_as() => {
            return Some(format!("a reply to {} was accepted at {}", reply.at, before.known_as()));
        }
        SagaEvent::Requested { .. } | SagaEvent::Declined { .. }
            if (after.at, after.status) != (before.at, before.status) =>
        {
            return Some("the saga moved at an event that only records a request".into());
        }
        _ => {}
    }
    if after.at == before.at
        && after.attempt < before.attempt
        && !matches!(event, SagaEvent::Operated { .. })
        && !migrated
    {
        return Some(format!("attempt {} of a step became attempt {}", before.attempt, after.attempt));
    }
    commands(event)
}

/// Checks that the event sends only commands of the saga's current step.
fn commands(event: &SagaEvent) -> Option<String> {
    let (SagaEvent::Started { progress, send, .. }
    | SagaEvent::Replied { progress, send, .. }
    | SagaEvent::Timed { progress, send, .. }
    | SagaEvent::Operated { progress, send, .. }) = event
    else {
        return None;
    };
    let wrong = send.iter().find(|command| command.at != progress.known_as())?;
    Some(format!("the saga is at {} and sends a command of {}", progress.known_as(), wrong.at))
}

/// Ranks the stages of a saga. The rank never decreases: first forward through the steps, then back through the same
/// steps, then to the end.
fn rank(at: StepRef) -> (u8, usize) {
    match at {
        StepRef::Forward(step) => (0, step),
        StepRef::Undo(step) => (1, usize::MAX - step),
        StepRef::Closing(step) => (2, step),
    }
}
