//! A document per saga: what operators see, and how timers that are due are found.

use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, TimeZone, Utc};
use serde::{Deserialize, Serialize};

use super::{
    progress::{Failure, Fault, FaultKind, Progress, SagaEvent, Status},
    timers::Timers,
};
use crate::{
    bus::Message,
    clock::LAST_DUE_MILLISECONDS,
    commit::DocumentKey,
    event::{Position, StreamId},
    handler::{Handler, HandlerError, Terminal},
    notice::Notice,
    work::Work,
};

/// Follows the sagas' own events and keeps a document for each saga: in collection `saga.<name>`, under the saga's id, due
/// when its next timer is. A saga that moves several times within one batch is written once.
#[derive(Clone, Debug, Default)]
pub struct Index {
    timers: Timers,
}

impl Index {
    /// One that says so when it comes upon a timer.
    pub(crate) fn telling(timers: Timers) -> Self {
        Self { timers }
    }
}

/// The document of one saga.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SagaStatus {
    /// The saga's name.
    pub saga: String,
    /// Its id.
    pub saga_id: String,
    /// The definition it keeps to.
    pub definition_hash: String,
    /// Its state.
    pub status: Status,
    /// The step it is at.
    pub step: String,
    /// How often that step was asked for.
    pub attempts: u32,
    /// When it started.
    pub started_at: DateTime<Utc>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
    /// What went wrong last at the step it is at, and why it goes back.
    pub last_error: Option<String>,
    /// The event that brought it there, which has the commands it waits for.
    #[serde(default)]
    pub position: Position,
}

impl SagaStatus {
    fn of(stream: &StreamId, progress: &Progress, position: Position) -> Self {
        Self {
            saga: stream.category().trim_start_matches("saga.").to_owned(),
            saga_id: stream.id().to_owned(),
            definition_hash: progress.definition.clone(),
            status: progress.status,
            step: progress.step.clone(),
            attempts: progress.attempt,
            started_at: time(progress.started),
            ended_at: progress.ended.map(time),
            last_error: progress.last_error(),
            position,
        }
    }
}

fn time(millis: i64) -> DateTime<Utc> {
    Utc.timestamp_millis_opt(millis).single().unwrap_or_default()
}

/// The fields of a saga event that the index wants.
#[derive(Deserialize)]
struct Glimpse {
    progress: Progress,
    #[serde(default)]
    fault: Option<Fault>,
}

/// The events after which a saga that was stuck is not.
const LEAVES_STUCK: [&str; 2] = ["saga.operated", "saga.migrated"];
/// What stands before the category of a saga in the name of a collection that has a document for each saga which is stuck.
pub const STUCK: &str = "stuck.";

/// What went wrong where the very first step could not even be asked for: nothing else tells it.
fn unsent(progress: &Progress, message: &Message) -> Option<Fault> {
    let trouble = progress.trouble.as_ref().filter(|_| &*message.type_name == "saga.started")?;
    let kind = if progress.status == Status::Stuck { FaultKind::Stuck } else { FaultKind::Failed };
    let Failure { step, reason } = trouble.clone();
    Some(Fault { kind, step, attempt: progress.attempt, reason, silent: Vec::new() })
}

#[async_trait]
impl Handler for Index {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        if !<SagaEvent as crate::Event>::TYPES.iter().any(|known| *known.name == *message.type_name) {
            return Ok(());
        }
        let stream = StreamId::parse(&message.subject).terminal()?;
        let Glimpse { progress, fault } = serde_json::from_str(&message.data).terminal()?;
        let status = SagaStatus::of(&stream, &progress, message.position);
        let body: Arc<str> = serde_json::to_string(&status)?.into();
        let key = DocumentKey::new(stream.category(), stream.id());
        // What is beyond the calendar is never due.
        let due = progress.wakes().filter(|due| *due <= LAST_DUE_MILLISECONDS).map(time);
        self.timers.set(stream.id(), due);
        let key_if_stuck = DocumentKey::new(format!("{STUCK}{}", stream.category()), stream.id());
        if progress.status == Status::Stuck && progress.ended.is_none() {
            work.put_json(&key_if_stuck, Some(body.clone()), None);
        } else if LEAVES_STUCK.contains(&&*message.type_name) {
            work.remove(&key_if_stuck);
        }
        let fault = fault.or_else(|| unsent(&progress, message));
        self.timers.heard(stream.id(), fault.as_ref());
        if let Some(fault) = fault {
            let (saga, saga_id) = (status.saga.as_str().into(), stream.id().into());
            work.notice(Notice::Saga { saga, saga_id, fault });
        }
        work.put_json(&key, Some(body), due);
        Ok(())
    }
}
