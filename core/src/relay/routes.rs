//! The routes of a service. The routes determine the topics and the messages for the events of the service.

use std::sync::Arc;

use serde::Deserialize;

use crate::{
    bus::{Message, Outgoing},
    event::{DecodeError, EventError, Recorded, Version},
    saga::{Command, StepEvent, attribute},
    store::LogQuery,
};

/// The topics and messages for the events of a service.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    pub(crate) service: Arc<str>,
    /// The topic of the service's events.
    events: Arc<str>,
    published: Vec<Arc<str>>,
    internal: Vec<Arc<str>>,
}

impl Routes {
    /// Creates the routes of a service. The events of the service go to `<service>.events`. The commands of its sagas
    /// go to `<participant>.commands`. Its replies to the sagas of other services go to `<their service>.commands`.
    pub fn of(service: &str) -> Self {
        let (events, internal) = (format!("{service}.events").into(), vec![format!("step.{service}").into()]);
        Self { service: service.into(), events, published: Vec::new(), internal }
    }

    /// Publishes the events of this category.
    pub fn publish(&mut self, category: &str) {
        self.published.push(category.into());
    }

    /// Sends the commands of the sagas whose streams have this category.
    pub(crate) fn saga(&mut self, category: &str) {
        self.internal.push(category.into());
    }

    /// The categories whose events are published.
    pub(crate) fn published(&self) -> &[Arc<str>] {
        &self.published
    }

    pub(crate) fn query(&self) -> LogQuery {
        LogQuery::categories(self.published.iter().chain(&self.internal).cloned())
    }

    /// Returns the messages for an event. An event of a saga becomes the commands that the saga sends, an event of a
    /// step becomes the reply of the step, and any other event is sent unchanged. The messages do not yet carry the
    /// lane of the relay.
    ///
    /// # Errors
    /// Fails if the event cannot be parsed.
    pub fn messages(&self, event: &Recorded) -> Result<Vec<Outgoing>, DecodeError> {
        let category = event.stream.category();
        if category.starts_with("saga.") {
            return self.commands(event);
        }
        if category.starts_with("step.") {
            return self.reply(event);
        }
        Ok(vec![Outgoing { topic: self.events.clone(), message: Message::of(event, &self.service) }])
    }

    fn commands(&self, event: &Recorded) -> Result<Vec<Outgoing>, DecodeError> {
        #[derive(Deserialize)]
        struct Sending {
            #[serde(default)]
            send: Vec<Command>,
            progress: SendingProgress,
        }
        #[derive(Deserialize)]
        struct SendingProgress {
            step: String,
        }
        let Sending { send, progress: SendingProgress { step } } =
            serde_json::from_str(&event.data).map_err(|error| unreadable(event, error.to_string()))?;
        let message = |command: Command| {
            let extensions = [
                (attribute::AT, command.at.to_string()),
                (attribute::STEP_NAME, step.clone()),
                (attribute::CALL, command.call.to_string()),
                (attribute::ATTEMPT, command.attempt.to_string()),
                (attribute::MUST_SUCCEED, command.must_succeed.to_string()),
                (attribute::REPLY_TO, self.service.to_string()),
            ];
            let message = Message {
                // The effects of the command are derived from the id of the command, so that the command takes effect
                // only once, however many attempts are made.
                id: command.id,
                type_name: command.type_name.into(),
                schema_version: command.schema_version,
                data: <Box<str>>::from(command.data).into(),
                metadata: event.metadata.caused_by(event.id),
                version: Version::START,
                extensions: extensions.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
                ..Message::of(event, &self.service)
            };
            Outgoing { topic: format!("{}.commands", command.to).into(), message }
        };
        Ok(send.into_iter().map(message).collect())
    }

    fn reply(&self, event: &Recorded) -> Result<Vec<Outgoing>, DecodeError> {
        let Some(StepEvent::Replied { saga, reply_to, .. }) = event.decode()? else {
            return Ok(Vec::new());
        };
        let message = Message { key: saga.into(), ..Message::of(event, &self.service) };
        Ok(vec![Outgoing { topic: format!("{reply_to}.commands").into(), message }])
    }
}

fn unreadable(event: &Recorded, reason: String) -> DecodeError {
    let Recorded { stream, version, position, type_name, schema_version, .. } = event;
    let source = EventError::Undecodable { type_name: type_name.to_string(), version: *schema_version, reason };
    DecodeError { stream: stream.clone(), version: *version, position: *position, source }
}
