//! The routes of a service. The routes determine the topics and the messages for the events of the service.

use std::sync::Arc;

use crate::{
    bus::{Message, Outgoing},
    event::{DecodeError, EventError, Recorded},
    saga::{Command, CurrentStep, Glimpse, StepCommand, StepEvent},
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
        let events = format!("{service}.events").into();
        let internal = vec![format!("step.{service}").into()];
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
        let Glimpse { send, progress: CurrentStep { step }, .. }: Glimpse<_, Vec<Command>> =
            Glimpse::of(&event.data).map_err(|error| unreadable(event, error.to_string()))?;
        let message = |command: Command| {
            let topic = format!("{}.commands", command.to).into();
            Outgoing { topic, message: StepCommand::to_message(command, &step, event, &self.service) }
        };
        Ok(send.into_iter().map(message).collect())
    }

    fn reply(&self, event: &Recorded) -> Result<Vec<Outgoing>, DecodeError> {
        let Some(StepEvent::Replied { saga, reply_to, passed: false, .. }) = event.decode()? else {
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
