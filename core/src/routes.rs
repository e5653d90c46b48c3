//! The routes of a service: which events go to which topic, and as which messages.

use std::sync::Arc;

use serde::Deserialize;

use crate::{
    bus::{Message, Outgoing},
    event::{Recorded, Version},
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

/// The longest name of a service: even with the additions for topics, relay and parts, every store and bus accepts it.
pub(crate) const SERVICE_BYTES_MAX: usize = 80;

/// Returns whether the name is valid for a service, and so for topics, which contain it.
pub(crate) fn is_service_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    !name.is_empty() && name.len() <= SERVICE_BYTES_MAX && name.bytes().all(plain)
}

impl Routes {
    /// The routes of a service. Its events go to `<service>.events`, commands of its sagas to `<participant>.commands`,
    /// and its replies to other services' sagas to `<their service>.commands`.
    pub fn of(service: &str) -> Self {
        let (events, internal) = (format!("{service}.events").into(), vec![format!("step.{service}").into()]);
        Self { service: service.into(), events, published: Vec::new(), internal }
    }

    /// Publishes the events of this category.
    pub fn publish(&mut self, category: &str) {
        self.published.push(category.into());
    }

    /// Sends the commands of the sagas recorded under this category.
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

    /// Returns the messages for an event: a saga's event gives the commands that it sends, a step's event gives its
    /// reply, and any other event goes out unchanged. The messages do not yet carry the lane that sends them.
    ///
    /// # Errors
    /// If the event cannot be parsed.
    pub fn messages(&self, event: &Recorded) -> Result<Vec<Outgoing>, String> {
        let category = event.stream.category();
        if category.starts_with("saga.") {
            return self.commands(event);
        }
        if category.starts_with("step.") {
            return self.reply(event);
        }
        Ok(vec![Outgoing { topic: self.events.clone(), message: Message::of(event, &self.service) }])
    }

    fn commands(&self, event: &Recorded) -> Result<Vec<Outgoing>, String> {
        #[derive(Deserialize)]
        struct Sending {
            #[serde(default)]
            send: Vec<Command>,
            progress: Standing,
        }
        #[derive(Deserialize)]
        struct Standing {
            step: String,
        }
        let Sending { send, progress: Standing { step } } =
            serde_json::from_str(&event.data).map_err(|error| error.to_string())?;
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
                // Effects derive from the command's id, so that all attempts at the command have one effect.
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

    fn reply(&self, event: &Recorded) -> Result<Vec<Outgoing>, String> {
        let Some(StepEvent::Replied { saga, reply_to, .. }) = event.decode().map_err(|error| error.to_string())? else {
            return Ok(Vec::new());
        };
        let message = Message { key: saga.into(), ..Message::of(event, &self.service) };
        Ok(vec![Outgoing { topic: format!("{reply_to}.commands").into(), message }])
    }
}
