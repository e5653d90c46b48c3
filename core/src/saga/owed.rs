//! Work that a participant owes after a restore of its database: the participant's answer is in a topic, but the
//! effects that were committed with the answer may be lost.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    barrier::{StepEvent, step_stream},
    progress::{Outcome, Reply, StepRef},
    step_command::StepCommand,
};
use crate::{
    Event,
    archive::Stored,
    base::backoff::Backoff,
    bus::Message,
    commit::{CommitError, Document, DocumentKey},
    decide::work::{Stale, Work},
    event::Position,
    handler::{HandlerError, Remedy},
    health::Health,
    store::{EventStore, Scan, StoreError, pages::PAGE},
};

/// How many times the work is attempted before the service starts without it.
const ATTEMPTS: usize = 8;
/// How long a service retries owed work in total. After that time, each remaining piece of work is tried once, because
/// members of a group that do not poll for five minutes lose their partitions.
const RETRIES_END: Duration = Duration::from_secs(120);
/// The shortest and the longest wait between two attempts. All waits together take a few seconds, which is enough when
/// an outside service is unavailable for a moment.
const BETWEEN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Identifies a step of a saga at a participant, to match commands with answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepKey {
    /// The stream that records the answers of the participant to the saga.
    pub stream: String,
    /// The place of the step in the plan.
    pub at: StepRef,
    /// The number of the participant within the step.
    pub call: usize,
}

impl StepKey {
    /// Returns the step that a message on `<service>.commands` asks for, or `None` if the message asks for no step.
    pub fn asked(service: &str, message: &Message) -> Option<Self> {
        let StepCommand { at, call, .. } = StepCommand::from_message(message).ok()?;
        Some(Self { stream: step_stream(service, &message.key), at, call })
    }

    /// Returns the step that an event reports as done, and the answer. After any other answer there is no work to redo:
    /// a step that was refused must not be carried out, because the saga may have compensated already.
    pub fn answered(event: &Stored<'_>) -> Option<(Self, Reply)> {
        let decoded = StepEvent::decode(&event.type_name, event.schema_version, &event.data).ok()??;
        let StepEvent::Replied { reply, .. } = decoded;
        matches!(reply.outcome, Outcome::Done(_))
            .then(|| (Self { stream: event.stream.to_string(), at: reply.at, call: reply.call }, reply))
    }
}

/// Work to do before a service reads its inbox: a command, and the answer that the service gave to the command.
///
/// The answer is binding: the saga may have gone on with that answer already, or will read that answer from its topic
/// before any later answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Owed {
    /// The command.
    pub message: Message,
    /// The answer, which says that the step was done.
    pub reply: Reply,
    /// The position of the answer in the log.
    pub answered_at: Position,
}

impl Owed {
    /// Returns the document of this work. The documents of a service are read in the order of the answers' positions,
    /// which is the order in which the work was done.
    pub fn document(&self, service: &str) -> Document {
        let key = DocumentKey::new(collection(service), format!("{:020}", self.answered_at.0));
        Document { key, version: 1, body: serde_json::to_string(self).unwrap_or_default().into(), due: None }
    }
}

fn collection(service: &str) -> String {
    format!("owed.{service}")
}

/// A participant that can redo the work it owes after a restore.
#[async_trait]
pub(crate) trait Debtor: Send + Sync {
    /// Stages the effects that belong to an earlier answer. An aggregate finds out from the ids which of these effects
    /// it already has, no matter how many commands it has executed since then.
    ///
    /// # Errors
    /// Returns an error if the participant now gives a different answer.
    async fn do_again(&self, owed: &Owed, work: &mut Work) -> Result<(), HandlerError>;
}

/// Redoes the work that a restored participant owes, in the original order. Work that cannot be done stays owed, is
/// reported, and is attempted again at the next start.
pub(crate) async fn settle(
    service: &str,
    store: &Arc<dyn EventStore>,
    debtor: &dyn Debtor,
    health: &Health,
    shutdown: &CancellationToken,
) {
    let part = format!("{service}.owed");
    let mut after = Arc::<str>::from("");
    let mut left = 0;
    let mut away = Backoff::long();
    let started_at = Instant::now();
    while !shutdown.is_cancelled() {
        let page = match store.scan(&collection(service), &Scan::After(after.clone()), PAGE).await {
            Ok(page) => page,
            Err(error) => {
                health.reporter(&part, shutdown).trouble(format!("the owed work cannot be read: {error}"));
                away.wait().await;
                continue;
            }
        };
        let Some(last) = page.last() else { break };
        after = last.key.id.clone();
        for document in page {
            if shutdown.is_cancelled() {
                return;
            }
            let attempts = if started_at.elapsed() < RETRIES_END { ATTEMPTS } else { 1 };
            if let Err(reason) = again_and_again(store, debtor, &document, attempts, shutdown).await {
                left += 1;
                tracing::error!(
                    service, document = %document.key, %reason,
                    "a step that was reported as done before the database was restored cannot be done again: remove \
                     the cause, then restart the service"
                );
            }
        }
    }
    health.remove(&part);
    if left == 0 {
        return;
    }
    let mut reporter = health.reporter(&part, shutdown);
    reporter.attention(Some(format!(
        "{left} steps that were reported as done before the database was restored cannot be done again: see the log \
         for the reasons"
    )));
    reporter.fine();
}

async fn again_and_again(
    store: &Arc<dyn EventStore>,
    debtor: &dyn Debtor,
    document: &Document,
    attempts_max: usize,
    shutdown: &CancellationToken,
) -> Result<(), String> {
    let owed: Owed =
        serde_json::from_str(&document.body).map_err(|error| format!("document {}: {error}", document.key))?;
    let mut between = Backoff::between(BETWEEN.0, BETWEEN.1);
    let mut attempts = 0;
    loop {
        let reason = match once(store, debtor, document, &owed).await {
            Ok(()) => return Ok(()),
            // Another instance has done the work.
            Err(Failed::Gone) => return Ok(()),
            // This failure does not count as an attempt, because without its store the service could not do anything
            // else either.
            Err(Failed::Away(error)) => {
                tracing::warn!(document = %document.key, %error, "doing the answered steps again");
                error
            }
            Err(Failed::Because(reason)) => {
                attempts += 1;
                reason
            }
        };
        if attempts >= attempts_max || shutdown.is_cancelled() {
            return Err(reason);
        }
        between.wait().await;
    }
}

enum Failed {
    Gone,
    Away(String),
    Because(String),
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::Away(error.to_string()),
            error => Self::Because(error.to_string()),
        }
    }
}

async fn once(
    store: &Arc<dyn EventStore>,
    debtor: &dyn Debtor,
    document: &Document,
    owed: &Owed,
) -> Result<(), Failed> {
    if store.document(&document.key).await?.is_none() {
        return Err(Failed::Gone);
    }
    // An aggregate remembers only recent commands. Later commands may have displaced the commands that belong to this
    // answer.
    let mut work = Work::new(store.clone(), Stale::Everything).searching();
    work.begin(owed.message.id, owed.message.effects());
    debtor.do_again(owed, &mut work).await.map_err(|error| match error.remedy() {
        Remedy::AwaitStore => Failed::Away(error.to_string()),
        Remedy::RetryMessage | Remedy::Park | Remedy::AwaitBuild => Failed::Because(error.to_string()),
    })?;
    work.put_expecting(&document.key, document.version, None, None);
    match work.commit().await {
        Ok(_) => Ok(()),
        Err(error @ CommitError::Unavailable(_)) => Err(Failed::Away(error.to_string())),
        Err(error) => Err(Failed::Because(error.to_string())),
    }
}
