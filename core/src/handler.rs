//! Handlers: user code that reacts to messages, and the errors by which it reports a failure.

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
/// Work staged in `work` is committed together with the checkpoint, for many messages at once: exactly one effect per
/// event of the log, and per offset of a bus. A bus may carry one message at two offsets, for example after its
/// publisher crashed. Commands to aggregates then find their earlier results; documents must be written so that a
/// second write changes nothing (compare [`Message::version`]). Effects outside the store happen at least once: pass
/// [`Work::cause_id`] as their idempotency key.
///
/// A panic in a handler counts as an error for that message.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Stages the effects of the message. `?` on any error means: retry this message later, and hold back messages with
    /// the same key until then.
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError>;

    /// Called with each batch before its first message: the place to read documents for the whole batch in one round
    /// trip.
    async fn prepare(&self, _messages: &[&Message], _work: &mut Work) -> Result<(), HandlerError> {
        Ok(())
    }

    /// Called instead of [`handle`](Self::handle) after the store has refused the effects of this message alone,
    /// because they are too large or invalid. Stages what to commit instead; an error parks the message.
    async fn refused(&self, _message: &Message, reason: &str, _work: &mut Work) -> Result<(), HandlerError> {
        Err(reason.to_owned()).terminal()
    }
}

/// Why a message was not handled. `?` makes this from any error; the message is then retried with growing delays, and
/// parked after too many failures. [`Terminal::terminal`] parks the message at once. An event that this build does not
/// know waits, without a limit, for a build that knows it.
#[derive(Debug)]
pub struct HandlerError {
    source: Box<dyn Error + Send + Sync>,
    remedy: Remedy,
}

/// What to do about a failed message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remedy {
    /// Park the message and retry it at a later time.
    RetryMessage,
    /// Park the message until an operator redrives it.
    Park,
    /// This build does not know the message, but another build may: park the message until such a build takes it.
    AwaitBuild,
    /// The message is not at fault: the store is unavailable, so wait for it.
    AwaitStore,
}

/// The text of an error whose own text is not available.
const NO_TEXT: &str = "an error whose text cannot be shown: its Display";

impl HandlerError {
    /// Returns the text of the error, even if the `Display` of a user's error panics.
    pub(crate) fn text(&self) -> String {
        caught_now(|| self.source.to_string()).unwrap_or_else(|panic| format!("{NO_TEXT} {panic}"))
    }

    pub(crate) fn remedy(&self) -> Remedy {
        // The `source` of an error is user code too, and may panic.
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

    /// An error for a message that this build does not understand but another build does: the message waits for that
    /// build.
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

/// Turns an error into one that is not retried.
pub trait Terminal<T> {
    /// On an error, parks the message at once: a retry would not help.
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
