//! Notices for operators. Each notice writes one line to the log of the process and increments one counter.

use std::sync::Arc;

use uuid::Uuid;

use crate::{
    health::Health,
    saga::{Fault, FaultKind},
};

/// A notice for an operator. A notice is sent only after the work that caused it is committed, so that a repeated
/// attempt does not send a notice twice.
#[derive(Clone, Debug)]
pub(crate) enum Notice {
    /// A message was not handled.
    Message(FailedMessage),
    /// A step of a saga had a fault.
    Saga { saga: Arc<str>, saga_id: Arc<str>, fault: Fault },
}

#[derive(Clone, Debug)]
pub(crate) struct FailedMessage {
    pub key: Arc<str>,
    pub id: Uuid,
    pub type_name: Arc<str>,
    pub position: i64,
    pub attempts: u32,
    pub reason: String,
    /// Whether the message is retried automatically.
    pub retries: bool,
}

impl Notice {
    /// Writes the log line and increments the counter. `subscription` is the name of the worker.
    pub fn tell(&self, subscription: &str, health: &Health) {
        match self {
            Self::Message(failed) => tell_message(failed, subscription, health),
            Self::Saga { saga, saga_id, fault } => tell_saga(saga, saga_id, fault, health),
        }
    }
}

fn tell_message(failed: &FailedMessage, subscription: &str, health: &Health) {
    let FailedMessage { key, id, type_name, position, attempts, reason, retries } = failed;
    let labels = [("subscription", subscription)];
    if *retries {
        health.count("annals_messages_failed_total", &labels);
        tracing::warn!(
            subscription, %key, message = %id, %type_name, position, attempts, %reason,
            "a message failed and will be retried"
        );
    } else {
        health.count("annals_dead_letters_total", &labels);
        tracing::error!(
            subscription, %key, message = %id, %type_name, position, attempts, %reason,
            "a message became a dead letter: redrive or drop the message"
        );
    }
}

fn tell_saga(saga: &str, saga_id: &str, fault: &Fault, health: &Health) {
    let Fault { kind, step, attempt, reason, .. } = fault;
    let labels = [("saga", saga), ("step", step.as_str())];
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
