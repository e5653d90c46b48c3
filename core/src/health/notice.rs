//! Notices for operators. Each notice prints one log line (`tracing`) and increments one counter.

use std::{fmt, sync::Arc};

use uuid::Uuid;

use crate::health::Health;

/// A notice for an operator. A notice is sent only after the work that caused it is committed, so that a repeated
/// attempt does not send a notice twice.
pub(crate) trait Notice: fmt::Debug + Send + Sync {
    /// Writes the log line and increments the counter. `subscription` is the name of the worker.
    fn send(&self, subscription: &str, health: &Health);
}

/// The notice that a message was not handled.
#[derive(Debug)]
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

impl Notice for FailedMessage {
    fn send(&self, subscription: &str, health: &Health) {
        let Self { key, id, type_name, position, attempts, reason, retries } = self;
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
}
