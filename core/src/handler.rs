//! What a user writes to react to messages, and how it says that one did not work.

use std::{error::Error, fmt, sync::Arc};

use async_trait::async_trait;

use crate::{
    bus::Message,
    event::{DecodeError, EventError},
    panic::caught_now,
    store::StoreError,
    work::Work,
};

/// Reacts to messages, from the log or from a bus, in order per key.
///
/// What it stages in `work` is committed together with the checkpoint, for many messages at once: exactly one effect per
/// event of the log, and per offset of a bus. A bus may carry one message at two offsets, as when its publisher crashed: then
/// commands to aggregates find their results, and a document has to be written so that twice is as good as once (compare
/// [`Message::version`]). Effects outside the store are at least once: give them [`Work::cause_id`] as their idempotency key.
///
/// A handler that panics has failed at that message, as if it had returned an error.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Stages what the message causes. `?` on any error means: try this message again later, and meanwhile hold back
    /// those with the same key.
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError>;

    /// Called with each batch before its first message: the place to read documents for all of them in one round trip.
    async fn prepare(&self, _messages: &[&Message], _work: &mut Work) -> Result<(), HandlerError> {
        Ok(())
    }

    /// Called instead of [`handle`](Self::handle) once the store has refused what this message alone had staged: too large, or
    /// nothing that it can hold. Stages what is to be committed in its place; an error parks the message.
    async fn refused(&self, _message: &Message, reason: &str, _work: &mut Work) -> Result<(), HandlerError> {
        Err(reason.to_owned()).terminal()
    }
}

/// Why a message was not handled. Made by `?` from any error; then it is tried again with growing delays, and parked when
/// it has failed often. [`Terminal::terminal`] parks it at once. An event that this build does not know waits for a build that
/// does, however long that takes.
#[derive(Debug)]
pub struct HandlerError {
    source: Box<dyn Error + Send + Sync>,
    remedy: Remedy,
}

/// What to do about a failed message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remedy {
    /// Park it with a time to try again.
    RetryMessage,
    /// Park it until somebody redrives it.
    Park,
    /// Another build knows what this one does not: park it until such a build takes it.
    AwaitBuild,
    /// Nothing is wrong with the message: the store is away, wait for it.
    AwaitStore,
}

/// What stands for the text of an error whose text cannot be had.
const NO_TEXT: &str = "an error whose text cannot be shown: its Display";

impl HandlerError {
    /// What is wrong, also where the error of a user panics when it is asked.
    pub(crate) fn text(&self) -> String {
        caught_now(|| self.source.to_string()).unwrap_or_else(|panic| format!("{NO_TEXT} {panic}"))
    }

    pub(crate) fn remedy(&self) -> Remedy {
        // The source of an error is code of a user's too.
        caught_now(|| self.remedy_of_causes()).unwrap_or(Remedy::RetryMessage)
    }

    fn remedy_of_causes(&self) -> Remedy {
        let mut cause: Option<&(dyn Error + 'static)> = Some(&*self.source);
        while let Some(error) = cause {
            match error.downcast_ref() {
                Some(StoreError::Unavailable(_)) => return Remedy::AwaitStore,
                Some(StoreError::Refused(_)) => return Remedy::Park,
                Some(StoreError::Corrupt(_)) | None => {}
            }
            let decoding = error.downcast_ref::<DecodeError>().map(|error| &error.source);
            match decoding.or_else(|| error.downcast_ref::<EventError>()) {
                Some(EventError::UnknownType { .. } | EventError::FutureVersion { .. }) => return Remedy::AwaitBuild,
                Some(EventError::Undecodable { .. } | EventError::Unencodable { .. }) => return Remedy::Park,
                None => cause = error.source(),
            }
        }
        self.remedy
    }

    /// A message that this build does not know what to do with, as another build does: it waits for that one.
    pub fn await_build(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { source: error.into(), remedy: Remedy::AwaitBuild }
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl<E: Into<Box<dyn Error + Send + Sync>>> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self { source: error.into(), remedy: Remedy::RetryMessage }
    }
}

/// Opts out of retrying.
pub trait Terminal<T> {
    /// Parks the message at once if this failed: trying again would not help.
    fn terminal(self) -> Result<T, HandlerError>;
}

impl<T, E: Into<HandlerError>> Terminal<T> for Result<T, E> {
    fn terminal(self) -> Result<T, HandlerError> {
        self.map_err(|error| HandlerError { remedy: Remedy::Park, ..error.into() })
    }
}

#[async_trait]
impl<H: Handler + ?Sized> Handler for Arc<H> {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        (**self).handle(message, work).await
    }

    async fn prepare(&self, messages: &[&Message], work: &mut Work) -> Result<(), HandlerError> {
        (**self).prepare(messages, work).await
    }

    async fn refused(&self, message: &Message, reason: &str, work: &mut Work) -> Result<(), HandlerError> {
        (**self).refused(message, reason, work).await
    }
}
