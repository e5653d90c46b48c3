//! Messages as CloudEvents 1.0 in Kafka: binary mode out, binary and structured mode in.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use annals::{Message, Metadata, Position, Version, bus::Undecodable, event::named_id};
use chrono::{DateTime, SecondsFormat, Utc};
use rdkafka::message::{Header, Headers, OwnedHeaders};
use serde_json::value::RawValue;
use uuid::Uuid;

/// The media type of a structured event.
const STRUCTURED: &str = "application/cloudevents+json";
/// Undecodable bytes are kept up to here: a document holds no more.
const RAW_BYTES_MAX: usize = 1_000_000;
/// What a record takes beside what is counted, generously.
const RECORD_BYTES: usize = 128;
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
    let mut headers = OwnedHeaders::new_with_capacity(14 + message.extensions.len());
    each_header(message, |name, value| {
        let taken = std::mem::replace(&mut headers, OwnedHeaders::new_with_capacity(0));
        headers = taken.insert(Header { key: name, value: Some(value) });
    });
    headers
}

/// About how much the broker will count for it, uncompressed.
pub(crate) fn size(message: &Message) -> usize {
    let mut size = RECORD_BYTES + message.key.len() + message.data.len();
    each_header(message, |name, value| size += name.len() + value.len() + HEADER_BYTES);
    size
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
    if let Some(lane) = message.lane {
        each("ce_lane", &lane.to_string());
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

fn read(record: &impl rdkafka::Message) -> Result<Message, String> {
    let mut attributes: BTreeMap<String, String> = BTreeMap::new();
    let mut content_type = String::new();
    if let Some(headers) = record.headers() {
        for header in headers.iter() {
            let Ok(value) = std::str::from_utf8(header.value.unwrap_or_default()) else {
                // Only what would be an attribute has to be text.
                if header.key.starts_with("ce_") {
                    return Err(format!("header {} is no UTF-8", header.key));
                }
                continue;
            };
            match header.key {
                "content-type" => content_type = value.to_ascii_lowercase(),
                attribute::TRACEPARENT | attribute::TRACESTATE => {
                    attributes.insert(header.key.to_owned(), value.to_owned());
                }
                name => {
                    if let Some(name) = name.strip_prefix("ce_") {
                        attributes.insert(name.to_owned(), value.to_owned());
                    }
                }
            }
        }
    }
    let payload = record.payload().map(std::str::from_utf8).transpose().map_err(|_| "its value is no UTF-8")?;
    let data: Arc<str> = if content_type.starts_with(STRUCTURED) {
        // Headers may repeat attributes; what counts is the event.
        attributes.retain(|name, _| [attribute::TRACEPARENT, attribute::TRACESTATE].contains(&&**name));
        structured(payload.unwrap_or_default(), &mut attributes)?
    } else {
        let data = payload.unwrap_or("null");
        serde_json::from_str::<&RawValue>(data).map_err(|error| format!("its value is no JSON: {error}"))?;
        data.into()
    };
    let key = record.key().map(std::str::from_utf8).transpose().map_err(|_| "its key is no UTF-8")?;
    message(attributes, key, data, record.timestamp().to_millis())
}

/// Takes an event apart that is one JSON object.
fn structured(payload: &str, attributes: &mut BTreeMap<String, String>) -> Result<Arc<str>, String> {
    let members: BTreeMap<String, &RawValue> =
        serde_json::from_str(payload).map_err(|error| format!("it is no structured CloudEvent: {error}"))?;
    let mut data = None;
    for (name, value) in members {
        match &*name {
            "data" => data = Some(value.get().into()),
            "data_base64" => return Err("its data is not JSON".into()),
            _ => {
                let text = serde_json::from_str::<String>(value.get()).unwrap_or_else(|_| value.get().to_owned());
                attributes.insert(name, text);
            }
        }
    }
    Ok(data.unwrap_or_else(|| "null".into()))
}

fn message(
    mut attributes: BTreeMap<String, String>,
    key: Option<&str>,
    data: Arc<str>,
    millis: Option<i64>,
) -> Result<Message, String> {
    let mut required = |name: &str| {
        let value = attributes.remove(name).filter(|value| !value.is_empty());
        value.ok_or_else(|| format!("it is no CloudEvent: no {name}"))
    };
    let specversion = required("specversion")?;
    if specversion != "1.0" {
        return Err(format!("CloudEvents {specversion:?} is not known, only 1.0"));
    }
    let (id, source, type_name) = (required("id")?, required("source")?, required("type")?);
    // Ids of others are any text, unique for their source.
    let id = Uuid::parse_str(&id).unwrap_or_else(|_| named_id(Uuid::NAMESPACE_URL, &format!("{source} {id}")));
    let subject = attributes.remove("subject");
    let time = match attributes.remove("time") {
        Some(time) => {
            DateTime::parse_from_rfc3339(&time).map_err(|error| format!("its time {time:?}: {error}"))?.to_utc()
        }
        None => millis.and_then(DateTime::from_timestamp_millis).unwrap_or(DateTime::<Utc>::UNIX_EPOCH),
    };
    attributes.remove("datacontenttype");
    // What is no number is not ours: others may give these names to something else.
    let mut number = |name: &str| {
        let number = attributes.get(name)?.parse::<i64>().ok()?;
        attributes.remove(name);
        Some(number)
    };
    let (position, version) = (number(attribute::POSITION), number(attribute::VERSION));
    let (schema_version, lane) = (number(attribute::SCHEMA_VERSION), number(attribute::LANE));
    // Those of others need not be UUIDs.
    let mut cause = |name: &str| attributes.remove(name).and_then(|text| Uuid::parse_str(&text).ok()).unwrap_or(id);
    let (correlation_id, causation_id) = (cause(attribute::CORRELATION), cause(attribute::CAUSATION));
    let traceparent = attributes.remove(attribute::TRACEPARENT).map(Into::into);
    let key: Arc<str> = key.or(subject.as_deref()).map_or_else(|| id.to_string().into(), Into::into);
    Ok(Message {
        id,
        type_name: type_name.into(),
        schema_version: schema_version.and_then(|version| i32::try_from(version).ok()).unwrap_or(1),
        source: source.into(),
        subject: subject.map_or_else(|| key.clone(), Into::into),
        key,
        data,
        metadata: Metadata { correlation_id, causation_id, traceparent },
        time,
        position: Position(position.unwrap_or(0)),
        version: Version(version.unwrap_or(0)),
        // Without a position there is nothing to compare.
        lane: lane.filter(|_| position.is_some()).and_then(|lane| u32::try_from(lane).ok()),
        extensions: attributes,
    })
}
