//! Reads a saga's stream, and waits for its end.

use std::{sync::Arc, time::Duration};

use annals::{
    EventStore, StreamId, Version,
    saga::{Outcome, Progress, SagaEvent, Status},
};
use axum::http::StatusCode;
use chrono::{DateTime, TimeZone, Utc};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{endings::Endings, problem::Problem};
use crate::api::{Moment, SagaView};

/// The most events of a saga that are shown. One that repeats its steps for ever has more.
const TIMELINE_MAX: usize = 1_000;

/// The sagas of the order service.
#[derive(Clone)]
pub struct Sagas {
    pub store: Arc<dyn EventStore>,
    pub endings: Endings,
    pub stopping: CancellationToken,
}

/// Somebody who looks at a saga, and may wait for its end.
pub struct Watch<'s> {
    sagas: &'s Sagas,
    stream: StreamId,
    until: Instant,
    /// `None` at the very end.
    ended: Option<watch::Receiver<()>>,
}

impl Sagas {
    /// Looks at the saga of this name about this id, for so long.
    pub fn watch(&self, saga: &str, id: &str, wait: Duration) -> Result<Watch<'_>, Problem> {
        let stream = StreamId::new(&format!("saga.{saga}"), id);
        let stream = stream.map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.to_string()))?;
        let ended = self.endings.of(stream.as_str());
        Ok(Watch { sagas: self, stream, until: Instant::now() + wait, ended: Some(ended) })
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if let Some(ended) = self.ended.take() {
            self.sagas.endings.leave(self.stream.as_str(), ended);
        }
    }
}

impl Watch<'_> {
    /// Whether its time is over.
    pub fn is_over(&self) -> bool {
        self.until <= Instant::now()
    }

    /// Waits for its end, or until somebody has to see to it, from the last look on. False when the time is over, or the service
    /// stops.
    pub async fn end(&mut self) -> bool {
        let Some(ended) = &mut self.ended else { return false };
        let woken = tokio::select! {
            // The sender is gone when it has ended.
            woken = timeout_at(self.until, ended.changed()) => woken.is_ok(),
            () = self.sagas.stopping.cancelled() => false,
        };
        if woken {
            *ended = self.sagas.endings.of(self.stream.as_str());
        }
        woken
    }

    /// The saga as it is now; `None` if it has not started.
    pub async fn view(&self) -> Result<Option<SagaView>, Problem> {
        let Self { sagas, stream, .. } = self;
        let events = sagas.store.read_stream(stream, Version::START, TIMELINE_MAX).await;
        let events = events.map_err(|error| Problem::unavailable(error.to_string()))?;
        let (mut timeline, mut last) = (Vec::with_capacity(events.len()), None::<Progress>);
        for event in events {
            let unreadable = |reason: String| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, reason);
            let Some(happened) = event.decode::<SagaEvent>().map_err(|error| unreadable(error.to_string()))? else {
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
            let progress = happened.progress().clone();
            // A reply is about the step that the saga was at before it.
            let step = last.as_ref().map_or(&progress.step, |before| &before.step).clone();
            let (at, event) = (event.recorded_at, event.type_name.to_string());
            timeline.push(Moment { at, event, step, outcome, reason, status: name(progress.status) });
            last = Some(progress);
        }
        Ok(last.map(|progress| SagaView {
            saga: stream.category().trim_start_matches("saga.").to_owned(),
            status: name(progress.status),
            step: progress.step.clone(),
            started_at: time(progress.started),
            ended_at: progress.ended.map(time),
            last_error: progress.failure.map(|failure| format!("{}: {}", failure.step, failure.reason)),
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
