//! An event as a line of JSON, in the form that the `annals` command and the event streams of `annals-http` use.

use std::{borrow::Cow, io::Write};

use chrono::{DateTime, Datelike, SecondsFormat, Timelike, Utc};
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::Stored;
use crate::event::{Position, Version};

/// Appends one event to `line` as a line of JSON that ends with a line break. This code formats the line itself, for
/// speed: an export may have a million lines. Apart from the field names, the line holds exactly what [`EventLine`]
/// reads.
///
/// `is_json`: whether the caller knows that payload and metadata are JSON.
pub fn write_line(event: &Stored<'_>, is_json: bool, line: &mut Vec<u8>) {
    // Writing to memory does not fail.
    _ = write!(line, r#"{{"position":{},"stream":"#, event.position.0);
    text(&event.stream, line);
    _ = write!(line, r#","version":{},"id":""#, event.version.0);
    line.extend_from_slice(event.id.hyphenated().encode_lower(&mut Uuid::encode_buffer()).as_bytes());
    line.extend_from_slice(br#"","type":"#);
    text(&event.type_name, line);
    _ = write!(line, r#","schema_version":{},"recorded_at":""#, event.schema_version);
    time(event.recorded_at, line);
    line.push(b'"');
    for (name, value) in [("metadata", &event.metadata), ("data", &event.data)] {
        line.extend_from_slice(b",\"");
        line.extend_from_slice(name.as_bytes());
        if is_one_line(value) && (is_json || raw(value).is_some()) {
            line.extend_from_slice(b"\":");
            line.extend_from_slice(value.as_bytes());
        } else {
            line.extend_from_slice(b"_text\":");
            text(value, line);
        }
    }
    line.extend_from_slice(b"}\n");
}

/// Writes a string as a JSON string.
fn text(text: &str, line: &mut Vec<u8>) {
    // A string can always be written as JSON.
    _ = serde_json::to_writer(line, text);
}

/// Writes a time as RFC 3339 in UTC, to the microsecond.
fn time(time: DateTime<Utc>, line: &mut Vec<u8>) {
    let Some(year) = u32::try_from(time.year()).ok().filter(|year| *year <= 9_999) else {
        _ = write!(line, "{}", time.to_rfc3339_opts(SecondsFormat::Micros, true));
        return;
    };
    let mut digits = |mut number: u32, width: usize, end: u8| {
        let mut buffer = [b'0'; 7];
        buffer[width] = end;
        for digit in buffer[..width].iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
        line.extend_from_slice(&buffer[..=width]);
    };
    digits(year, 4, b'-');
    digits(time.month(), 2, b'-');
    digits(time.day(), 2, b'T');
    digits(time.hour(), 2, b':');
    digits(time.minute(), 2, b':');
    digits(time.second(), 2, b'.');
    // A leap second has more than a million microseconds.
    digits((time.nanosecond() / 1_000).min(999_999), 6, b'Z');
}

/// A parsed line, whose strings borrow from the text of the line.
#[derive(Debug, Deserialize)]
pub struct EventLine<'a> {
    position: i64,
    #[serde(borrow)]
    stream: Cow<'a, str>,
    version: i64,
    id: Uuid,
    #[serde(rename = "type", borrow)]
    type_name: Cow<'a, str>,
    schema_version: i32,
    recorded_at: DateTime<Utc>,
    #[serde(borrow, default)]
    metadata: Option<&'a RawValue>,
    #[serde(borrow, default)]
    metadata_text: Option<Cow<'a, str>>,
    /// The payload byte for byte, if the payload is JSON on one line.
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
    /// The payload as a string, if the payload is not JSON on one line.
    #[serde(borrow, default)]
    data_text: Option<Cow<'a, str>>,
}

impl<'a> EventLine<'a> {
    /// Returns the event. The error says what is wrong with the line.
    pub fn stored(self) -> Result<Stored<'a>, &'static str> {
        let either = |raw: Option<&'a RawValue>, text: Option<Cow<'a, str>>| match (raw, text) {
            (Some(raw), None) => Some(Cow::Borrowed(raw.get())),
            (None, text) => text,
            (Some(_), Some(_)) => None,
        };
        Ok(Stored {
            position: Position(self.position),
            stream: self.stream,
            version: Version(self.version),
            id: self.id,
            type_name: self.type_name,
            schema_version: self.schema_version,
            data: either(self.data, self.data_text).ok_or("an event has either `data` or `data_text`")?,
            metadata: either(self.metadata, self.metadata_text)
                .ok_or("an event has either `metadata` or `metadata_text`")?,
            recorded_at: self.recorded_at,
        })
    }
}

/// Returns the text as raw JSON if the line can hold every byte of the text unchanged.
pub fn raw(text: &str) -> Option<&RawValue> {
    is_one_line(text).then(|| serde_json::from_str(text).ok()).flatten()
}

/// Returns whether the text can be raw JSON in a line: JSON would lose white space around a value, and an event must
/// stay on one line.
fn is_one_line(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends_in_space = |byte: Option<&u8>| byte.is_none_or(u8::is_ascii_whitespace);
    !ends_in_space(bytes.first()) && !ends_in_space(bytes.last()) && !bytes.contains(&b'\n') && !bytes.contains(&b'\r')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_line_keeps_every_byte_of_a_payload() {
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
            for (metadata, micros) in
                [("{\"note\": 1}", 1_700_000_000_123_456), (data, -1), (data, 253_402_300_800_000_000)]
            {
                let event = Stored {
                    position: Position(7),
                    stream: "order-\"1\"".into(),
                    version: Version(2),
                    id: Uuid::new_v4(),
                    type_name: "order.placed".into(),
                    schema_version: 1,
                    data: data.into(),
                    metadata: metadata.into(),
                    recorded_at: DateTime::from_timestamp_micros(micros).unwrap_or_default(),
                };
                let mut line = Vec::new();
                write_line(&event, false, &mut line);
                let line = String::from_utf8(line).unwrap_or_default();
                assert_eq!((line.lines().count(), line.ends_with('\n')), (1, true), "{line}");
                let read: EventLine = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
                assert_eq!(read.stored().as_ref(), Ok(&event), "{line}");
            }
        }
    }
}
