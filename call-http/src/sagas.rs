//! Reads a saga's stream, and waits for its end.

use std::{borrow::Borrow, fmt, sync::Arc, time::Duration};

use annals::{
    EventStore, Recorded, StreamId, Version,
    saga::{Outcome, Progress, SagaEvent, Status},
};
use axum::http::StatusCode;
use chrono::{DateTime, TimeZone, Utc};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::{
    follower::{Followed, Follower, Whole},
    problem::{Problem, without_files},
};

/// The maximum number of events shown per saga. Only a saga that repeats its steps endlessly has more.
const TIMELINE_MAX: usize = 1_000;

/// The status of a saga that is waiting for an operator.
pub const STUCK: &str = "stuck";

/// The state of a saga, and its history.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SagaView {
    /// The name of the saga's definition.
    pub saga: String,
    /// `running`, `compensating`, `completed`, `compensated` or `stuck`.
    pub status: String,
    /// The current step.
    pub step: String,
    /// When the saga started, by the clock of the store.
    pub started_at: DateTime<Utc>,
    /// When the saga ended; `null` while it runs.
    pub ended_at: Option<DateTime<Utc>>,
    /// Why the saga was compensated or got stuck.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// The events of the saga, oldest first; at most 1,000.
    pub timeline: Vec<Moment>,
}

/// An event in the history of a saga.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Moment {
    /// When the event was recorded.
    pub at: DateTime<Utc>,
    /// `saga.started`, `saga.replied`, `saga.timed`, `saga.operated` or `saga.migrated`.
    pub event: String,
    /// The step that the event is about.
    pub step: String,
    /// The outcome of a reply: `done`, `refused`, `failed` or `unknown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// Why the step was not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The status of the saga after the event.
    pub status: String,
}

impl SagaView {
    /// Returns whether the saga has ended or waits for an operator.
    pub fn has_settled(&self) -> bool {
        self.ended_at.is_some() || self.is_stuck()
    }

    /// Returns whether the saga is waiting for an operator.
    pub fn is_stuck(&self) -> bool {
        self.status == STUCK
    }
}

/// The sagas of a service.
#[derive(Clone)]
pub struct Sagas {
    /// The store of the sagas.
    pub store: Arc<dyn EventStore>,
    /// The follower that signals the ends of sagas.
    pub follower: Follower,
    /// Cancelled when requests must stop waiting.
    pub over: CancellationToken,
}

impl fmt::Debug for Sagas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sagas").field("follower", &self.follower).finish_non_exhaustive()
    }
}

/// A request's watch on a saga, with the time for which the request may wait.
#[derive(Debug)]
pub struct Watch<'s> {
    sagas: &'s Sagas,
    until: Instant,
    followed: Followed,
}

impl Sagas {
    /// Watches the saga with this name for the stream `subject`, for the given time.
    ///
    /// # Errors
    /// A 400 if the id of the subject cannot be the id of a saga.
    pub fn watch(&self, saga: &str, subject: StreamId, wait: Duration) -> Result<Watch<'_>, Problem> {
        let stream = StreamId::new(&format!("saga.{saga}"), subject.id());
        let stream = stream.map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.to_string()))?;
        let followed = self.follower.follow(stream, subject);
        Ok(Watch { sagas: self, until: Instant::now() + wait, followed })
    }
}

impl Watch<'_> {
    /// Returns whether the request has waited for as long as it may.
    pub fn is_over(&self) -> bool {
        self.until <= Instant::now()
    }

    /// Waits until the saga has ended or needs an operator. Returns false if the time runs out or the service stops.
    pub async fn end(&self) -> bool {
        tokio::select! {
            ended = timeout_at(self.until, self.followed.ended()) => ended.is_ok(),
            () = self.sagas.over.cancelled() => false,
        }
    }

    /// Returns all events up to the signalled end, if the watch began before the first event.
    pub fn whole(&self) -> Option<Whole> {
        self.followed.whole()
    }

    /// Returns the current state of the saga; `None` if the saga has not started.
    ///
    /// # Errors
    /// A 503 if the store does not answer, and a 500 if this build cannot read the saga.
    pub async fn view(&self) -> Result<Option<SagaView>, Problem> {
        let events = self.sagas.store.read_stream(&self.followed.saga, Version::START, TIMELINE_MAX).await;
        self.view_of(&events.map_err(|error| Problem::unavailable(without_files(&error)))?)
    }

    /// Returns the state of the saga. `events` must be all events of the saga.
    ///
    /// # Errors
    /// A 500 if this build cannot read the saga.
    pub fn view_of(&self, events: &[impl Borrow<Recorded>]) -> Result<Option<SagaView>, Problem> {
        let mut timeline = Vec::with_capacity(events.len());
        let mut last = None::<Progress>;
        for event in events.iter().map(Borrow::borrow) {
            let unreadable = |reason: String| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, reason);
            let Some(happened) = event.decode::<SagaEvent>().map_err(|error| unreadable(without_files(&error)))? else {
                continue;
            };
            let (outcome, reason) = match &happened {
                SagaEvent::Replied { reply, .. } => outcome(&reply.outcome),
                SagaEvent::Requested { verb, by, reason, .. } | SagaEvent::Operated { verb, by, reason, .. } => {
                    (None, Some(format!("{verb:?} by {by}: {reason}")))
                }
                SagaEvent::Declined { why, .. } => (None, Some(why.clone())),
                SagaEvent::Started { .. } | SagaEvent::Timed { .. } | SagaEvent::Migrated { .. } => (None, None),
            };
            let reason = reason.map(|reason| without_files(&reason));
            let progress = happened.progress().clone();
            // A reply belongs to the step at which the saga waited before the reply arrived.
            let step = last.as_ref().map_or(&progress.step, |before| &before.step).clone();
            timeline.push(Moment {
                at: event.recorded_at,
                event: event.type_name.to_string(),
                step,
                outcome,
                reason,
                status: name(progress.status),
            });
            last = Some(progress);
        }
        Ok(last.map(|progress| SagaView {
            saga: self.followed.saga.category().trim_start_matches("saga.").to_owned(),
            status: name(progress.status),
            step: progress.step.clone(),
            started_at: time(progress.started),
            ended_at: progress.ended.map(time),
            last_error: progress.failure.map(|failure| format!("{}: {}", failure.step, without_files(&failure.reason))),
            timeline,
        }))
    }
}

fn outcome(outcome: &Outcome) -> (Option<String>, Option<String>) {
    let (name, reason) = match outcome {
        Outcome::Done(_) => ("done", None),
        Outcome::Refused(reason) => ("refused", Some(reason.clone())),
        Outcome::Failed(reason) => ("failed", Some(reason.clone())),
        Outcome::Unknown(reason) => ("unknown", Some(reason.clone())),
    };
    (Some(name.to_owned()), reason)
}

fn name(status: Status) -> String {
    match status {
        Status::Running => "running",
        Status::Compensating => "compensating",
        Status::Completed => "completed",
        Status::Compensated => "compensated",
        Status::Stuck => "stuck",
    }
    .to_owned()
}

fn time(millis: i64) -> DateTime<Utc> {
    Utc.timestamp_millis_opt(millis).single().unwrap_or_default()
}
