//! Describes the history of a saga in words.

use std::collections::HashMap;

use annals::{
    Recorded,
    saga::{CallState, Outcome, Progress, SagaEvent, Status, StepRef},
};
use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::{moment::span, output::short};

/// The maximum number of characters shown of a reply.
const REPLY_CHARS_MAX: usize = 120;

/// An event of a saga.
#[derive(Serialize)]
pub(crate) struct Entry {
    pub version: i64,
    pub position: i64,
    pub at: DateTime<Utc>,
    /// The type of the event, such as `saga.replied`.
    pub event: String,
    /// The status of the saga after the event.
    pub status: String,
    /// The step of the saga after the event.
    pub step: String,
    /// The number of attempts at the step, after the event.
    pub attempt: u32,
    /// A description of the event, in words.
    pub lines: Vec<String>,
}

pub(crate) fn entries(history: &[(Recorded, SagaEvent)]) -> Vec<Entry> {
    let mut steps = HashMap::new();
    let mut before: Option<&Progress> = None;
    let mut entries = Vec::new();
    for (recorded, event) in history {
        let progress = event.progress();
        steps.insert(progress.known_as(), progress.step.clone());
        let mut lines = happened(event, before, &steps);
        for command in sent(event) {
            let again = if command.attempt > 1 { format!(", attempt {}", command.attempt) } else { String::new() };
            let step = steps.get(&command.at).map_or("", |step| step.as_str());
            lines.push(format!("→ {}: {} for {}{again}", command.to, command.type_name, named(command.at, step)));
        }
        let changed = before.is_some_and(|before| (before.status, before.ended) != (progress.status, progress.ended));
        if changed {
            let why = match &progress.failure {
                Some(failure) if progress.ended.is_none() => {
                    format!(", because of {}: {}", failure.step, failure.reason)
                }
                _ => String::new(),
            };
            lines.push(format!("= {}{why}", state(progress)));
        }
        entries.push(Entry {
            version: recorded.version.0,
            position: recorded.position.0,
            at: recorded.recorded_at,
            event: recorded.type_name.to_string(),
            status: format!("{:?}", progress.status).to_lowercase(),
            step: progress.step.clone(),
            attempt: progress.attempt,
            lines,
        });
        before = Some(progress);
    }
    entries
}

fn happened(event: &SagaEvent, before: Option<&Progress>, steps: &HashMap<StepRef, String>) -> Vec<String> {
    let mut lines = Vec::new();
    let gave_up = match event {
        SagaEvent::Started { saga, .. } => {
            lines.push(format!("{saga} started"));
            None
        }
        SagaEvent::Replied { reply, gave_up, progress, .. } => {
            let step = steps.get(&reply.at).map_or(progress.step.as_str(), |step| step.as_str());
            let outcome = match &reply.outcome {
                Outcome::Done(serde_json::Value::Null) => "done".to_owned(),
                Outcome::Done(value) => format!("done {}", short(&value.to_string(), REPLY_CHARS_MAX)),
                Outcome::Refused(reason) => format!("refused: {reason}"),
                Outcome::Failed(reason) => format!("failed: {reason}"),
                Outcome::Unknown(reason) => format!("outcome unknown: {reason}"),
            };
            let attempt = if reply.attempt > 1 { format!(" (attempt {})", reply.attempt) } else { String::new() };
            lines.push(format!("← {}{attempt} {outcome}", named(reply.at, step)));
            gave_up.as_ref()
        }
        SagaEvent::Timed { gave_up, .. } => {
            lines.push(match before {
                Some(before) if before.retrying => "the retry delay is over".to_owned(),
                _ => "a timer fired".to_owned(),
            });
            gave_up.as_ref()
        }
        SagaEvent::Operated { verb, by, reason, .. } => {
            lines.push(format!("! {} by {by}: {reason}", word(verb)));
            None
        }
        SagaEvent::Requested { verb, by, reason, .. } => {
            lines.push(format!("! {by} requests {}: {reason}", word(verb)));
            None
        }
        SagaEvent::Declined { verb, why, .. } => {
            lines.push(format!("! {} declined: {why}", word(verb)));
            None
        }
        SagaEvent::Migrated { from, progress } => {
            lines.push(format!("moved from definition {from} to {}", progress.definition));
            None
        }
    };
    lines.extend(gave_up.map(|failure| format!("gave up {}: {}", failure.step, failure.reason)));
    lines
}

/// Returns the name of an action as the command line spells it.
pub(crate) fn word(verb: &impl Serialize) -> String {
    serde_json::to_value(verb).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn sent(event: &SagaEvent) -> &[annals::saga::Command] {
    match event {
        SagaEvent::Started { send, .. }
        | SagaEvent::Replied { send, .. }
        | SagaEvent::Timed { send, .. }
        | SagaEvent::Operated { send, .. } => send,
        SagaEvent::Requested { .. } | SagaEvent::Declined { .. } | SagaEvent::Migrated { .. } => &[],
    }
}

/// Returns the name of a step, with `undo` for a compensation.
pub(crate) fn named(at: StepRef, step: &str) -> String {
    match at {
        StepRef::Forward(_) | StepRef::Closing(_) => step.to_owned(),
        StepRef::Undo(_) => format!("undo {step}"),
    }
}

/// Describes the state of a saga.
pub(crate) fn state(progress: &Progress) -> String {
    match progress.status {
        Status::Stuck if progress.ended.is_some() => "abandoned".to_owned(),
        Status::Completed => "completed".to_owned(),
        Status::Compensated => "compensated".to_owned(),
        status => format!("{} at {}", format!("{status:?}").to_lowercase(), named(progress.at, &progress.step)),
    }
}

/// Describes what a running saga is waiting for.
pub(crate) fn waits(progress: &Progress, now: DateTime<Utc>) -> Option<String> {
    if progress.ended.is_some() {
        return None;
    }
    let step = named(progress.at, &progress.step);
    let timer = progress.wakes().and_then(DateTime::from_timestamp_millis).map(|due| match due - now {
        left if left.num_milliseconds() > 0 => format!(" (the timer fires in {})", span(left)),
        late => format!(" (the timer is {} late: check that a service runs this saga)", span(-late)),
    });
    let timer = timer.unwrap_or_default();
    Some(match progress.status {
        Status::Stuck => format!("waits at {step} for an operator: retry, skip-step, compensate or abandon"),
        _ if progress.retrying => format!("waits to retry {step}{timer}"),
        _ => {
            let open = progress.calls.iter().filter(|call| **call == CallState::Waiting).count();
            format!("waits for {open} of {} answers to {step}{timer}", progress.calls.len())
        }
    })
}
