//! The command of a saga as a message to a participant: the only place that writes and reads the attributes which
//! describe the step.

use std::{str::FromStr, sync::Arc};

use super::progress::{Command, Outcome, StepRef};
use crate::{
    bus::Message,
    event::{Recorded, Version},
    handler::{HandlerError, Terminal},
};

/// The names of the attributes.
const AT: &str = "sagastep";
const STEP_NAME: &str = "sagastepname";
const CALL: &str = "sagacall";
const ATTEMPT: &str = "sagaattempt";
const MUST_SUCCEED: &str = "sagamustsucceed";
const REPLY_TO: &str = "sagareplyto";

/// A step command as the participant receives it.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCommand {
    /// The place in the plan.
    pub at: StepRef,
    /// The index of the participant within the step.
    pub call: usize,
    /// The number of the attempt.
    pub attempt: u32,
    /// Whether a refusal counts as a failure, because the saga cannot go back.
    pub must_succeed: bool,
    /// The service that runs the saga and gets the reply.
    pub reply_to: String,
}

impl StepCommand {
    /// Returns the message that carries a command. `event` is the event of the saga that sends the command, `step_name`
    /// is the current step after this event, and `reply_to` is the service that runs the saga.
    pub(crate) fn to_message(command: Command, step_name: &str, event: &Recorded, reply_to: &Arc<str>) -> Message {
        let extensions = [
            (AT, command.at.to_string()),
            // The name of the step is only for people who read the topic, because participants know a step by its
            // number. An attribute may not contain control characters.
            (STEP_NAME, step_name.replace(char::is_control, " ")),
            (CALL, command.call.to_string()),
            (ATTEMPT, command.attempt.to_string()),
            (MUST_SUCCEED, command.must_succeed.to_string()),
            (REPLY_TO, reply_to.to_string()),
        ];
        Message {
            // The effects of the command are derived from the id of the command, so that the command takes effect only
            // once, however many attempts are made.
            id: command.id,
            type_name: command.type_name.into(),
            schema_version: command.schema_version,
            data: <Box<str>>::from(command.data).into(),
            metadata: event.metadata.caused_by(event.id),
            version: Version::START,
            extensions: extensions.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            ..Message::of(event, reply_to)
        }
    }

    /// Reads the step that a message requests.
    ///
    /// # Errors
    /// Returns an error if the message lacks one of the step attributes, or if an attribute cannot be parsed.
    pub(crate) fn from_message(message: &Message) -> Result<Self, HandlerError> {
        Ok(Self {
            at: attribute(message, AT)?,
            call: attribute(message, CALL)?,
            attempt: attribute(message, ATTEMPT)?,
            must_succeed: attribute(message, MUST_SUCCEED)?,
            reply_to: attribute(message, REPLY_TO)?,
        })
    }

    /// Returns the outcome of a step that its participant refuses. For a step that must succeed, the outcome is a
    /// failure: if the step were recorded as refused, the barrier would block every further attempt.
    pub fn refused(&self, reason: String) -> Outcome {
        if self.must_succeed { Outcome::Failed(reason) } else { Outcome::Refused(reason) }
    }
}

fn attribute<T: FromStr>(message: &Message, name: &str) -> Result<T, HandlerError> {
    let text = message.extensions.get(name).ok_or_else(|| format!("the command lacks the attribute {name}"));
    text.terminal()?.parse().map_err(|_| format!("attribute {name} of the command cannot be parsed")).terminal()
}

#[cfg(test)]
mod tests {
    use chrono::Utc;
    use serde_json::value::RawValue;
    use uuid::Uuid;

    use super::*;
    use crate::event::{Metadata, Position, StreamId};

    #[test]
    fn step_name_with_a_control_character_fits_into_an_attribute() {
        let event = Recorded {
            position: Position(1),
            stream: StreamId::from_stored("saga.trip-a"),
            version: Version(1),
            id: Uuid::nil(),
            type_name: "saga.started".into(),
            schema_version: 1,
            data: "{}".into(),
            metadata: Metadata::default(),
            recorded_at: Utc::now(),
        };
        let command = Command {
            id: Uuid::nil(),
            to: "hotel".to_owned(),
            type_name: "hotel.hold".to_owned(),
            schema_version: 1,
            at: StepRef::Forward(0),
            call: 0,
            attempt: 1,
            must_succeed: false,
            data: RawValue::from_string("{}".to_owned()).unwrap_or_default(),
        };
        let message = StepCommand::to_message(command, "hold\nroom", &event, &"travel".into());
        assert_eq!(message.extensions[STEP_NAME], "hold room");
    }
}
