//! Keeps one document per saga. Operators read these documents, and the runner finds due timers in them.

use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, TimeZone, Utc};
use serde::{Deserialize, Serialize, de::IgnoredAny};

use super::{
    glimpse::Glimpse,
    progress::{Failure, Fault, FaultKind, Progress, SagaEvent, Status},
    timers::Timers,
};
use crate::{
    bus::Message,
    commit::DocumentKey,
    decide::work::Work,
    event::{Position, StreamId},
    handler::{Handler, HandlerError, Terminal},
    health::{Health, notice::Notice},
    store::clock::LAST_DUE_MILLISECONDS,
};

/// Reads the events of sagas and keeps a document for each saga. The document is stored in the collection `saga.<name>`
/// under the saga's id, and is due when the saga's next timer is due, or at once if an operator has requested an
/// action. If one batch contains several events of a saga, the document is written once.
#[derive(Clone, Debug, Default)]
pub struct Index {
    timers: Timers,
}

impl Index {
    /// Returns an index that reports to `timers` when each document becomes due.
    pub(crate) fn telling(timers: Timers) -> Self {
        Self { timers }
    }
}

/// The document of one saga.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SagaStatus {
    /// The saga's name.
    pub saga: String,
    /// The id of the saga.
    pub saga_id: String,
    /// The hash of the saga's definition.
    pub definition_hash: String,
    /// The state of the saga.
    pub status: Status,
    /// The name of the current step.
    pub step: String,
    /// The number of attempts at that step.
    pub attempts: u32,
    /// When the saga started.
    pub started_at: DateTime<Utc>,
    /// When the saga ended.
    pub ended_at: Option<DateTime<Utc>>,
    /// The last error at the current step, and why the saga goes back.
    pub last_error: Option<String>,
    /// The position of the saga's last event. Once the relay has passed this event, the bus has every command to which
    /// the saga awaits a reply.
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

/// The events after which a stuck saga is no longer stuck.
const LEAVES_STUCK: [&str; 2] = ["saga.operated", "saga.migrated"];
/// The prefix of the collections that contain a document for each stuck saga. The category of the saga follows the
/// prefix.
pub const STUCK: &str = "stuck.";

/// Returns the fault if the commands of the first step could not be sent. The event `saga.started` has no field for
/// this fault.
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
        let Glimpse { progress, fault, .. }: Glimpse<Progress, IgnoredAny, Option<Fault>> =
            Glimpse::of(&message.data).terminal()?;
        let status = SagaStatus::of(&stream, &progress, message.position);
        let body: Arc<str> = serde_json::to_string(&status)?.into();
        let key = DocumentKey::new(stream.category(), stream.id());
        // A time that a calendar date cannot represent is never due.
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
            work.notice(FaultNotice { saga: status.saga, saga_id: stream.id().to_owned(), fault });
        }
        work.put_json(&key, Some(body), due);
        Ok(())
    }
}

/// The notice that a step of a saga had a fault.
#[derive(Debug)]
struct FaultNotice {
    saga: String,
    saga_id: String,
    fault: Fault,
}

impl Notice for FaultNotice {
    fn send(&self, _subscription: &str, health: &Health) {
        let Self { saga, saga_id, fault: Fault { kind, step, attempt, reason, .. } } = self;
        let labels = [("saga", saga.as_str()), ("step", step.as_str())];
        match kind {
            FaultKind::Failed => {
                health.count("annals_saga_steps_failed_total", &labels);
                tracing::warn!(saga, saga_id, %step, attempt, %reason, "a step failed and will be retried");
            }
            FaultKind::TimedOut => {
                health.count("annals_saga_steps_timed_out_total", &labels);
                tracing::warn!(saga, saga_id, %step, attempt, %reason, "a step timed out and will be retried");
            }
            FaultKind::GaveUp => {
                health.count("annals_saga_steps_given_up_total", &labels);
                tracing::warn!(saga, saga_id, %step, attempt, %reason, "a step failed for good: the saga is compensated");
            }
            FaultKind::Stuck => {
                health.count("annals_sagas_stuck_total", &labels);
                tracing::error!(
                    saga, saga_id, %step, attempt, %reason,
                    "a saga is stuck: retry or skip the step, compensate or abandon the saga"
                );
            }
        }
    }
}
