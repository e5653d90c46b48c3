//! An event as a line of JSON: what `read`, `tail`, `replay` and `export` write, and `import` reads.

use std::{borrow::Cow, sync::Arc};

use annals::{Metadata, Position, Recorded, StreamId, Version};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

/// The line of an event. Borrows what it was made from.
#[derive(Serialize, Deserialize)]
pub(crate) struct EventLine<'a> {
    pub position: i64,
    #[serde(borrow)]
    pub stream: Cow<'a, str>,
    pub version: i64,
    pub id: Uuid,
    #[serde(rename = "type", borrow)]
    pub type_name: Cow<'a, str>,
    pub schema_version: i32,
    pub recorded_at: DateTime<Utc>,
    pub metadata: Metadata,
    /// The payload as it is, byte for byte, where it is JSON on one line.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub data: Option<&'a RawValue>,
    /// The payload as a text, where it is not.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub data_text: Option<Cow<'a, str>>,
}

impl<'a> EventLine<'a> {
    pub fn of(event: &'a Recorded) -> Self {
        let data = raw(&event.data);
        Self {
            position: event.position.0,
            stream: event.stream.as_str().into(),
            version: event.version.0,
            id: event.id,
            type_name: (&*event.type_name).into(),
            schema_version: event.schema_version,
            recorded_at: event.recorded_at,
            metadata: event.metadata.clone(),
            data_text: data.is_none().then(|| (&*event.data).into()),
            data,
        }
    }

    /// The event, or what is wrong with the line.
    pub fn recorded(self) -> Result<Recorded, String> {
        let data: Arc<str> = match (self.data, self.data_text) {
            (Some(data), None) => data.get().into(),
            (None, Some(text)) => text.into(),
            _ => return Err("an event has either `data` or `data_text`".into()),
        };
        Ok(Recorded {
            position: Position(self.position),
            stream: StreamId::from_stored(&self.stream),
            version: Version(self.version),
            id: self.id,
            type_name: self.type_name.into(),
            schema_version: self.schema_version,
            data,
            metadata: self.metadata,
            recorded_at: self.recorded_at,
        })
    }
}

/// The text as JSON to put into a line, if that leaves every byte of it where it is.
pub(crate) fn raw(text: &str) -> Option<&RawValue> {
    let raw: &RawValue = serde_json::from_str(text).ok()?;
    // Space around a value is not part of it, and a line must stay one.
    (raw.get().len() == text.len() && !text.contains(['\n', '\r'])).then_some(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_payload_survives_its_line() {
        for data in [
            r#"{"b":1,"a":2.50, "a":3}"#,
            "{\"a\":\n1}",
            " {}",
            "{} ",
            "no json",
            r#""\u00fc ü""#,
            "1e400",
            "123456789012345678901234567890.10",
        ] {
            let event = Recorded {
                position: Position(7),
                stream: StreamId::from_stored("order-\"1\""),
                version: Version(2),
                id: Uuid::new_v4(),
                type_name: "order.placed".into(),
                schema_version: 1,
                data: data.into(),
                metadata: Metadata::of_request(Uuid::new_v4()),
                recorded_at: DateTime::from_timestamp_micros(1_700_000_000_123_456).unwrap_or_default(),
            };
            let line = serde_json::to_string(&EventLine::of(&event)).unwrap_or_default();
            assert_eq!(line.lines().count(), 1, "{line}");
            let read: EventLine = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
            assert_eq!(read.recorded().as_ref(), Ok(&event), "{line}");
        }
    }
}
