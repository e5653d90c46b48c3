//! Handlers, which are user code that reacts to messages, and the errors with which a handler reports a failure.

use std::{error::Error, fmt, sync::Arc};

use async_trait::async_trait;

use crate::{
    base::panic::caught_now,
    bus::Message,
    decide::work::Work,
    event::{DecodeError, EventError},
    store::StoreError,
};

/// User code that reacts to messages from the log or from a bus. Messages with the same key are handled in order.
///
/// The effects staged in `work` are committed together with the checkpoint, for many messages at once. Each event of
/// the log, and each offset of a bus, therefore takes effect exactly once. A bus may carry one message at two offsets,
/// for example after its publisher crashed. In that case, a repeated command to an aggregate returns its earlier
/// result. Documents must be written so that a second write changes nothing (compare [`Message::version`]). Effects
/// outside the store happen at least once. Pass [`Work::cause_id`] as the idempotency key of such effects.
///
/// A panic in a handler counts as an error for that message.
///
/// ```
/// use annals::{DocumentKey, Event, Handler, HandlerError, Message, Subscription, Work};
/// use async_trait::async_trait;
///
/// /// The events that the handler reads; all other types are skipped.
/// #[derive(Event)]
/// #[event(prefix = "order", unknown = "skip")]
/// enum OrderEvent {
///     Placed { customer: String },
/// }
///
/// /// Stores the latest order of each customer.
/// struct LatestOrder;
///
/// #[async_trait]
/// impl Handler for LatestOrder {
///     async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
///         if let Some(OrderEvent::Placed { customer }) = message.decode()? {
///             work.put(&DocumentKey::new("latest-order", customer.as_str()), &message.subject)?;
///         }
///         Ok(())
///     }
/// }
///
/// // A `Subscription` calls the handler for events of its own service, a `Group` for messages of other services.
/// let subscription = Subscription::new("shop.latest-order", LatestOrder);
/// ```
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Stages the effects of the message. If the handler returns an error with `?`, the message is retried later, and
    /// messages with the same key are held back until then.
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError>;

    /// Prepares a batch. The worker calls this method before the first message of each batch. A handler can use this
    /// method to read the documents for the whole batch in one round trip.
    async fn prepare(&self, _messages: &[&Message], _work: &mut Work) -> Result<(), HandlerError> {
        Ok(())
    }

    /// Stages replacement effects for a message. The worker calls this method instead of [`handle`](Self::handle) after
    /// the store has refused the effects of the message as too large or invalid, even in a separate commit. If this
    /// method returns an error, the message is parked.
    async fn refused(&self, _message: &Message, reason: &str, _work: &mut Work) -> Result<(), HandlerError> {
        Err(reason.to_owned()).terminal()
    }
}

/// Why a message was not handled. The `?` operator converts any error to this type. The message is then parked, and
/// retried with growing delays; after too many failures, it becomes a dead letter. [`Terminal::terminal`] makes the
/// message a dead letter at once. An event of a type that this build cannot decode waits, without a time limit, for a
/// build that can decode it.
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
    /// This build cannot understand the message, but another build may. Park the message until such a build handles it.
    AwaitBuild,
    /// The store is unavailable, so the message is not at fault. Wait for the store.
    AwaitStore,
}

/// The text that replaces the text of an error whose `Display` panics.
const NO_TEXT: &str = "an error whose text cannot be shown, because its Display";

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

    /// Creates an error for a message that this build cannot understand but another build can. The message waits for
    /// that build.
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

/// Marks an error as final, so that the message becomes a dead letter and is not retried automatically.
pub trait Terminal<T> {
    /// Turns the error, if there is one, into an error that makes the message a dead letter at once, because a retry
    /// would not help.
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
