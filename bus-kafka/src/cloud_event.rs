//! Messages as CloudEvents 1.0 in Kafka: binary mode out, binary and structured mode in.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    str::FromStr,
    sync::Arc,
};

use annals::{Message, Metadata, Position, Version, bus::Undecodable, event::named_id};
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
    RECORD_BYTES + texts + extensions + message.metadata.traceparent.as_ref().map_or(0, |text| text.len())
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
    if let Some(traceparent) = &message.metadata.traceparent {
        each(attribute::TRACEPARENT, traceparent);
    }
    for (name, value) in &message.extensions {
        if name == attribute::TRACESTATE {
            each(name, value);
        } else {
            each(&format!("ce_{name}"), value);
        }
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
    traceparent: Option<Arc<str>>,
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
            attribute::TRACEPARENT => self.traceparent = Some(value.into()),
            attribute::LANE => self.lane = Some(value.into()),
            _ => _ = self.extensions.insert(name.to_owned(), value.into_owned()),
        }
    }
}

impl Attributes<'_> {
    /// Only those of the trace.
    fn of_trace(self) -> Self {
        let mut extensions = self.extensions;
        extensions.retain(|name, _| name == attribute::TRACESTATE);
        Self { traceparent: self.traceparent, extensions, ..Self::default() }
    }
}

fn read(record: &impl rdkafka::Message) -> Result<Message, String> {
    let (mut attributes, mut structured) = (Attributes::default(), false);
    for header in record.headers().into_iter().flat_map(Headers::iter) {
        let name = header.key.strip_prefix("ce_");
        let value = match std::str::from_utf8(header.value.unwrap_or_default()) {
            Ok(value) => value,
            // Only what is an attribute has to be text.
            Err(_) if name.is_some() => return Err(format!("header {} is no UTF-8", header.key)),
            Err(_) => continue,
        };
        match (header.key, name) {
            (_, Some(name)) => attributes.set(name, value.into()),
            ("content-type", _) => structured = value.to_ascii_lowercase().starts_with(STRUCTURED),
            (attribute::TRACEPARENT | attribute::TRACESTATE, _) => attributes.set(header.key, value.into()),
            _ => {}
        }
    }
    let payload = record.payload().map(std::str::from_utf8).transpose().map_err(|_| "its value is no UTF-8")?;
    let data = match payload {
        Some(payload) if structured => {
            // Headers may repeat attributes; what counts is the event.
            attributes = attributes.of_trace();
            read_structured(payload, &mut attributes)?
        }
        payload => {
            let data = payload.unwrap_or("null");
            serde_json::from_str::<&RawValue>(data).map_err(|error| format!("its value is no JSON: {error}"))?;
            data.into()
        }
    };
    let key = record.key().map(std::str::from_utf8).transpose().map_err(|_| "its key is no UTF-8")?;
    message(attributes, key, data, record.timestamp().to_millis())
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

fn message(attributes: Attributes<'_>, key: Option<&str>, data: Arc<str>, at: Option<i64>) -> Result<Message, String> {
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
            traceparent: attributes.traceparent,
        },
        time,
        position: Position(attributes.position.unwrap_or(0)),
        version: Version(attributes.version.unwrap_or(0)),
        // Without a position there is nothing to compare.
        lane: attributes.lane.filter(|_| attributes.position.is_some()),
        extensions: attributes.extensions,
    })
}
