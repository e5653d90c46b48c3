//! Messages as CloudEvents 1.0 in Kafka: binary mode out, binary and structured mode in.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    str::FromStr,
    sync::Arc,
};

use annals::{Message, Metadata, Position, TraceContext, Version, bus::Undecodable, event::named_id};
use chrono::{DateTime, SecondsFormat};
use rdkafka::message::{Header, Headers, OwnedHeaders};
use serde_json::value::RawValue;
use uuid::Uuid;

/// The media type of a structured event.
const STRUCTURED: &str = "application/cloudevents+json";
/// Undecodable bytes are kept up to here: a document holds no more.
const RAW_BYTES_MAX: usize = 1_000_000;
/// Headers of a message without extensions.
const HEADERS: usize = 14;
/// What a record takes beside its texts: names of headers, ids, numbers.
const RECORD_BYTES: usize = 640;
/// What a header takes beside its name and value.
const HEADER_BYTES: usize = 8;

/// The names of attributes, beside those of CloudEvents itself.
mod attribute {
    pub const POSITION: &str = "position";
    pub const VERSION: &str = "streamversion";
    pub const CORRELATION: &str = "correlationid";
    pub const CAUSATION: &str = "causationid";
    pub const SCHEMA_VERSION: &str = "schemaversion";
    pub const LANE: &str = "lane";
    pub const TRACEPARENT: &str = "traceparent";
    pub const TRACESTATE: &str = "tracestate";
}

/// The headers of a message.
pub(crate) fn headers(message: &Message) -> OwnedHeaders {
    let mut headers = Some(OwnedHeaders::new_with_capacity(HEADERS + message.extensions.len()));
    each_header(message, |name, value| {
        headers = headers.take().map(|headers| headers.insert(Header { key: name, value: Some(value) }));
    });
    headers.unwrap_or_default()
}

/// What the broker will count for it at most, uncompressed.
pub(crate) fn size(message: &Message) -> usize {
    let Message { key, data, source, type_name, subject, extensions, .. } = message;
    let texts = [key, data, source, type_name, subject].map(|text| text.len()).into_iter().sum::<usize>();
    let extensions = extensions.iter().map(|(name, value)| name.len() + value.len() + HEADER_BYTES).sum::<usize>();
    let trace = message.metadata.trace.as_ref();
    let trace = trace.map_or(0, |trace| trace.traceparent().len() + trace.tracestate().map_or(0, str::len));
    RECORD_BYTES + texts + extensions + trace
}

fn each_header(message: &Message, mut each: impl FnMut(&str, &str)) {
    let mut buffer = Uuid::encode_buffer();
    each("ce_specversion", "1.0");
    each("ce_id", message.id.hyphenated().encode_lower(&mut buffer));
    each("ce_source", &message.source);
    each("ce_type", &message.type_name);
    each("ce_subject", &message.subject);
    each("ce_time", &message.time.to_rfc3339_opts(SecondsFormat::Micros, true));
    each("content-type", "application/json");
    each("ce_correlationid", message.metadata.correlation_id.hyphenated().encode_lower(&mut buffer));
    each("ce_causationid", message.metadata.causation_id.hyphenated().encode_lower(&mut buffer));
    each("ce_schemaversion", &message.schema_version.to_string());
    if message.position > Position::START {
        each("ce_position", &message.position.0.to_string());
    }
    if message.version > Version::START {
        each("ce_streamversion", &message.version.0.to_string());
    }
    if let Some(lane) = &message.lane {
        each("ce_lane", lane);
    }
    if let Some(trace) = &message.metadata.trace {
        each(attribute::TRACEPARENT, trace.traceparent());
        if let Some(state) = trace.tracestate() {
            each(attribute::TRACESTATE, state);
        }
    }
    for (name, value) in &message.extensions {
        each(&format!("ce_{name}"), value);
    }
}

/// What a record says, whoever has written it.
pub(crate) fn decode(record: &impl rdkafka::Message) -> Result<Message, Undecodable> {
    // The client panics at a header whose name is no UTF-8, which only a strange producer can send.
    let read = catch_unwind(AssertUnwindSafe(|| read(record)));
    let read = read.unwrap_or_else(|_| Err("the name of a header is no UTF-8".into()));
    read.map_err(|reason| {
        let hex = |bytes: &[u8]| bytes.iter().take(RAW_BYTES_MAX).map(|byte| format!("{byte:02x}")).collect::<String>();
        let key = record.key().unwrap_or_default();
        let key = std::str::from_utf8(key).map_or_else(|_| hex(key), str::to_owned);
        Undecodable { reason, key: key.into(), raw: record.payload().map(hex).unwrap_or_default() }
    })
}

/// The attributes of an event, by name.
#[derive(Default)]
struct Attributes<'r> {
    specversion: Option<Cow<'r, str>>,
    id: Option<Cow<'r, str>>,
    source: Option<Cow<'r, str>>,
    type_name: Option<Cow<'r, str>>,
    subject: Option<Cow<'r, str>>,
    time: Option<Cow<'r, str>>,
    correlation_id: Option<Uuid>,
    causation_id: Option<Uuid>,
    trace: Trace<'r>,
    position: Option<i64>,
    version: Option<i64>,
    schema_version: Option<i32>,
    lane: Option<Arc<str>>,
    extensions: BTreeMap<String, String>,
}

impl<'r> Attributes<'r> {
    fn set(&mut self, name: &str, value: Cow<'r, str>) {
        fn number<N: FromStr>(into: &mut Option<N>, value: &str) -> bool {
            *into = value.parse().ok();
            into.is_some()
        }
        // What is no number is not ours: others may give these names to something else.
        let is_ours = match name {
            attribute::POSITION => number(&mut self.position, &value),
            attribute::VERSION => number(&mut self.version, &value),
            attribute::SCHEMA_VERSION => number(&mut self.schema_version, &value),
            _ => false,
        };
        if is_ours {
            return;
        }
        match name {
            "specversion" => self.specversion = Some(value),
            "id" => self.id = Some(value),
            "source" => self.source = Some(value),
            "type" => self.type_name = Some(value),
            "subject" => self.subject = Some(value),
            "time" => self.time = Some(value),
            "datacontenttype" => {}
            // Those of others need not be UUIDs.
            attribute::CORRELATION => self.correlation_id = Uuid::parse_str(&value).ok(),
            attribute::CAUSATION => self.causation_id = Uuid::parse_str(&value).ok(),
            attribute::TRACEPARENT | attribute::TRACESTATE => self.trace.add(name, value),
            attribute::LANE => self.lane = Some(value.into()),
            _ => _ = self.extensions.insert(name.to_owned(), value.into_owned()),
        }
    }
}

/// All values of `traceparent` and `tracestate`: only all of them show whether the trace context is valid.
#[derive(Default)]
struct Trace<'r> {
    parents: Vec<Cow<'r, str>>,
    states: Vec<Cow<'r, str>>,
}

impl<'r> Trace<'r> {
    fn add(&mut self, name: &str, value: Cow<'r, str>) {
        match name {
            attribute::TRACEPARENT => self.parents.push(value),
            _ => self.states.push(value),
        }
    }

    fn context(&self) -> Option<TraceContext> {
        TraceContext::parse(self.parents.iter().map(|text| &**text), self.states.iter().map(|text| &**text))
    }
}

fn read(record: &impl rdkafka::Message) -> Result<Message, String> {
    let mut attributes = Attributes::default();
    let mut transport = Trace::default();
    let mut structured = false;
    for header in record.headers().into_iter().flat_map(Headers::iter) {
        let name = header.key.strip_prefix("ce_");
        let value = match std::str::from_utf8(header.value.unwrap_or_default()) {
            Ok(value) => value,
            // Only what is an attribute has to be text.
            Err(_) if name.is_some() => return Err(format!("header {} is no UTF-8", header.key)),
            // Present and invalid, which is not the same as absent.
            Err(_) if matches!(header.key, attribute::TRACEPARENT | attribute::TRACESTATE) => "\0",
            Err(_) => continue,
        };
        match (header.key, name) {
            (_, Some(name)) => attributes.set(name, value.into()),
            ("content-type", _) => structured = value.to_ascii_lowercase().starts_with(STRUCTURED),
            (attribute::TRACEPARENT | attribute::TRACESTATE, _) => transport.add(header.key, value.into()),
            _ => {}
        }
    }
    let payload = record.payload().map(std::str::from_utf8).transpose().map_err(|_| "its value is no UTF-8")?;
    let data = match payload {
        Some(payload) if structured => {
            // Headers may repeat attributes; what counts is the event.
            attributes = Attributes::default();
            read_structured(payload, &mut attributes)?
        }
        payload => {
            let data = payload.unwrap_or("null");
            serde_json::from_str::<&RawValue>(data).map_err(|error| format!("its value is no JSON: {error}"))?;
            data.into()
        }
    };
    let key = record.key().map(std::str::from_utf8).transpose().map_err(|_| "its key is no UTF-8")?;
    // The headers of the transport are of the nearest hop, and the attributes of the event's origin.
    let trace = transport.context().or_else(|| attributes.trace.context());
    message(attributes, key, data, trace, record.timestamp().to_millis())
}

/// Takes an event apart that is one JSON object.
fn read_structured(payload: &str, attributes: &mut Attributes<'_>) -> Result<Arc<str>, String> {
    let members: BTreeMap<String, &RawValue> =
        serde_json::from_str(payload).map_err(|error| format!("it is no structured CloudEvent: {error}"))?;
    let mut data = None;
    for (name, value) in members {
        match &*name {
            "data" => data = Some(value.get().into()),
            "data_base64" => return Err("its data is not JSON".into()),
            _ => {
                let text = serde_json::from_str::<String>(value.get()).unwrap_or_else(|_| value.get().to_owned());
                attributes.set(&name, text.into());
            }
        }
    }
    Ok(data.unwrap_or_else(|| "null".into()))
}

fn message(
    attributes: Attributes<'_>,
    key: Option<&str>,
    data: Arc<str>,
    trace: Option<TraceContext>,
    at: Option<i64>,
) -> Result<Message, String> {
    fn required<'r>(name: &str, value: Option<Cow<'r, str>>) -> Result<Cow<'r, str>, String> {
        value.filter(|value| !value.is_empty()).ok_or_else(|| format!("it is no CloudEvent: no {name}"))
    }
    let specversion = required("specversion", attributes.specversion)?;
    if specversion != "1.0" {
        return Err(format!("CloudEvents {specversion:?} is not known, only 1.0"));
    }
    let (id, source) = (required("id", attributes.id)?, required("source", attributes.source)?);
    let type_name = required("type", attributes.type_name)?;
    // Ids of others are any text, unique for their source.
    let id = Uuid::parse_str(&id).unwrap_or_else(|_| named_id(Uuid::NAMESPACE_URL, &format!("{source} {id}")));
    let time = match attributes.time {
        Some(time) => {
            DateTime::parse_from_rfc3339(&time).map_err(|error| format!("its time {time:?}: {error}"))?.into()
        }
        None => at.and_then(DateTime::from_timestamp_millis).unwrap_or(DateTime::UNIX_EPOCH),
    };
    let key: Arc<str> = match (key, &attributes.subject) {
        (Some(key), _) => key.into(),
        (None, Some(subject)) => subject.as_ref().into(),
        (None, None) => id.to_string().into(),
    };
    // Mostly they are the same.
    let subject = attributes.subject.filter(|subject| **subject != *key).map_or_else(|| key.clone(), Into::into);
    Ok(Message {
        id,
        type_name: type_name.into(),
        schema_version: attributes.schema_version.unwrap_or(1),
        source: source.into(),
        subject,
        key,
        data,
        metadata: Metadata {
            correlation_id: attributes.correlation_id.unwrap_or(id),
            causation_id: attributes.causation_id.unwrap_or(id),
            trace,
        },
        time,
        position: Position(attributes.position.unwrap_or(0)),
        version: Version(attributes.version.unwrap_or(0)),
        // Without a position there is nothing to compare.
        lane: attributes.lane.filter(|_| attributes.position.is_some()),
        extensions: attributes.extensions,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rdkafka::{Timestamp, message::OwnedMessage};

    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const OTHER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

    /// What is read of an event with these headers.
    fn read(headers: &[(&str, &[u8])], structured: Option<&str>) -> Message {
        let required: &[(&str, &[u8])] = match structured {
            Some(_) => &[("content-type", b"application/cloudevents+json")],
            None => &[("ce_specversion", b"1.0"), ("ce_id", b"1"), ("ce_source", b"till"), ("ce_type", b"till.rang")],
        };
        let mut all = OwnedHeaders::new();
        for (key, value) in required.iter().chain(headers) {
            all = all.insert(Header { key, value: Some(*value) });
        }
        let value = structured.map(|text| text.as_bytes().to_vec());
        let record = OwnedMessage::new(value, None, "topic".into(), Timestamp::NotAvailable, 0, 0, Some(all));
        decode(&record).unwrap()
    }

    fn carried(message: &Message) -> Option<(&str, Option<&str>)> {
        message.metadata.trace.as_ref().map(|trace| (trace.traceparent(), trace.tracestate()))
    }

    #[test]
    fn trace_context_is_valid_or_absent() {
        let cases: &[(&[(&str, &[u8])], Option<(&str, Option<&str>)>)] = &[
            (&[("traceparent", PARENT.as_bytes())], Some((PARENT, None))),
            (
                &[("traceparent", PARENT.as_bytes()), ("tracestate", b"a=1"), ("tracestate", b"b=2")],
                Some((PARENT, Some("a=1,b=2"))),
            ),
            (&[("traceparent", PARENT.as_bytes()), ("tracestate", b"A")], Some((PARENT, None))),
            (&[("traceparent", PARENT.as_bytes()), ("tracestate", b"\xff")], Some((PARENT, None))),
            (&[("traceparent", b"anything"), ("tracestate", b"a=1")], None),
            (&[("tracestate", b"a=1")], None),
            (&[("traceparent", PARENT.as_bytes()), ("traceparent", OTHER.as_bytes())], None),
            (&[("traceparent", PARENT.as_bytes()), ("traceparent", b"\xff")], None),
            (&[("traceparent", b"00-00000000000000000000000000000000-00f067aa0ba902b7-01")], None),
            (&[("ce_traceparent", PARENT.as_bytes()), ("ce_tracestate", b"a=1")], Some((PARENT, Some("a=1")))),
            (&[("ce_traceparent", PARENT.as_bytes()), ("traceparent", OTHER.as_bytes())], Some((OTHER, None))),
        ];
        for (headers, expected) in cases {
            let message = read(headers, None);
            assert_eq!(carried(&message), *expected, "{headers:?}");
            assert!(message.extensions.is_empty(), "{message:?}");
        }
        let event = format!(
            r#"{{"specversion":"1.0","id":"1","source":"till","type":"till.rang","traceparent":"{PARENT}","tracestate":"a=1"}}"#
        );
        assert_eq!(carried(&read(&[], Some(&event))), Some((PARENT, Some("a=1"))));
        assert_eq!(carried(&read(&[("traceparent", OTHER.as_bytes())], Some(&event))), Some((OTHER, None)));
    }
}
