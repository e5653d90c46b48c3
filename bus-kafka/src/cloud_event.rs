//! Converts messages to and from CloudEvents 1.0 in Kafka: writes binary mode, and reads binary and structured mode.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use annals::{
    Message, Metadata, Position, TraceContext, Version,
    bus::Undecodable,
    event::{Party, UnknownFields, named_id},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use chrono::{DateTime, SecondsFormat};
use rdkafka::message::{Header, Headers, OwnedHeaders};
use serde_json::value::RawValue;
use uuid::Uuid;

/// The media type of a structured event.
const STRUCTURED: &str = "application/cloudevents+json";
/// Prefixes of the media types of batches, and of events in any format.
const BATCH: &str = "application/cloudevents-batch";
const ANY_STRUCTURED: &str = "application/cloudevents";
/// The maximum number of undecodable bytes to keep. The limit is needed because a document cannot hold more bytes.
const RAW_BYTES_MAX: usize = 1_000_000;
/// The number of headers of a message without extensions.
const HEADERS: usize = 16;
/// The overhead of a record in addition to its strings: names of headers, ids, numbers.
const RECORD_BYTES: usize = 640;
/// The overhead of a header in addition to its name and value.
const HEADER_BYTES: usize = 8;

/// The names of attributes.
mod attribute {
    pub const POSITION: &str = "position";
    pub const VERSION: &str = "streamversion";
    pub const CORRELATION: &str = "correlationid";
    pub const CAUSATION: &str = "causationid";
    pub const SCHEMA_VERSION: &str = "schemaversion";
    pub const LANE: &str = "lane";
    pub const ACTOR: &str = "actor";
    pub const TENANT: &str = "tenant";
    pub const TRACEPARENT: &str = "traceparent";
    pub const TRACESTATE: &str = "tracestate";
    /// The media type of the data, as an extension of a message whose data was not JSON.
    pub const DATA_CONTENT_TYPE: &str = "datacontenttype";
    /// The encoding of the data: `base64` if the data was bytes that are not text. The name comes from CloudEvents 0.3.
    pub const DATA_ENCODING: &str = "datacontentencoding";
}

/// Returns the headers of a message.
pub(crate) fn headers(message: &Message) -> OwnedHeaders {
    let mut headers = Some(OwnedHeaders::new_with_capacity(HEADERS + message.extensions.len()));
    each_header(message, |name, value| {
        headers = headers.take().map(|headers| headers.insert(Header { key: name, value: Some(value) }));
    });
    headers.unwrap_or_default()
}

/// Returns an upper bound on the uncompressed size that the broker counts for a message.
pub(crate) fn size(message: &Message) -> usize {
    let Message { key, data, source, type_name, subject, extensions, .. } = message;
    let texts = [key, data, source, type_name, subject].map(|text| text.len()).into_iter().sum::<usize>();
    let extensions = extensions.iter().map(|(name, value)| name.len() + value.len() + HEADER_BYTES).sum::<usize>();
    let trace = message.metadata.trace.as_ref();
    let trace = trace.map_or(0, |trace| trace.traceparent().len() + trace.tracestate().map_or(0, str::len));
    let parties = [&message.metadata.actor, &message.metadata.tenant];
    let parties = parties.into_iter().flatten().map(|party| party.as_str().len()).sum::<usize>();
    RECORD_BYTES + texts + extensions + trace + parties
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
    if let Some(actor) = &message.metadata.actor {
        each("ce_actor", actor.as_str());
    }
    if let Some(tenant) = &message.metadata.tenant {
        each("ce_tenant", tenant.as_str());
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

/// Decodes a record from any producer.
pub(crate) fn decode(record: &impl rdkafka::Message) -> Result<Message, Undecodable> {
    // The client panics if the name of a header is not UTF-8. Only an unusual producer can send such a header.
    let read = catch_unwind(AssertUnwindSafe(|| read(record)));
    let read = read.unwrap_or_else(|_| Err("the name of a header is not UTF-8".into()));
    read.map_err(|reason| {
        let key = record.key().unwrap_or_default();
        let key = std::str::from_utf8(key).map_or_else(|_| hex(key), str::to_owned);
        Undecodable { reason, key: key.into(), raw: record.payload().map(hex).unwrap_or_default() }
    })
}

/// Returns the bytes in hexadecimal, for people to read.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(RAW_BYTES_MAX).map(|byte| format!("{byte:02x}")).collect()
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
    data_content_type: Option<Cow<'r, str>>,
    correlation_id: Option<Cow<'r, str>>,
    causation_id: Option<Cow<'r, str>>,
    position: Option<Cow<'r, str>>,
    version: Option<Cow<'r, str>>,
    schema_version: Option<Cow<'r, str>>,
    lane: Option<Cow<'r, str>>,
    actor: Option<Cow<'r, str>>,
    tenant: Option<Cow<'r, str>>,
    trace: Trace<'r>,
    extensions: BTreeMap<String, String>,
    violation: Option<String>,
}

impl<'r> Attributes<'r> {
    fn set(&mut self, name: &str, value: Cow<'r, str>) {
        self.check(name, &value);
        let into = match name {
            "specversion" => &mut self.specversion,
            "id" => &mut self.id,
            "source" => &mut self.source,
            "type" => &mut self.type_name,
            "subject" => &mut self.subject,
            "time" => &mut self.time,
            attribute::CORRELATION => &mut self.correlation_id,
            attribute::CAUSATION => &mut self.causation_id,
            attribute::POSITION => &mut self.position,
            attribute::VERSION => &mut self.version,
            attribute::SCHEMA_VERSION => &mut self.schema_version,
            attribute::LANE => &mut self.lane,
            attribute::ACTOR => &mut self.actor,
            attribute::TENANT => &mut self.tenant,
            attribute::TRACEPARENT | attribute::TRACESTATE => return self.trace.add(name, value),
            _ => {
                self.extensions.insert(name.to_owned(), value.into_owned());
                return;
            }
        };
        *into = Some(value);
    }

    /// Records the first violation of the CloudEvents rules for attributes.
    fn check(&mut self, name: &str, value: &str) {
        let is_named = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let what = if name.is_empty() || !name.bytes().all(is_named) {
            "has a name with characters other than lower-case letters and digits"
        } else if value.chars().any(char::is_control) {
            "has a control character"
        } else if matches!(name, "subject" | "time" | "dataschema") && value.is_empty() {
            "is present but empty"
        } else {
            return;
        };
        self.violation.get_or_insert_with(|| format!("not a CloudEvent: attribute {name:?} {what}"));
    }

    /// Returns the attributes that a relay adds to a message, if a relay sent this message. Other producers may use the
    /// same names for other purposes. A message counts as relayed only if it has every attribute that a relay always
    /// writes, each in the right form. Any other message keeps these attributes as extensions.
    fn relayed(&mut self) -> Option<RelayAttributes> {
        let id = |value: &Option<Cow<'_, str>>| value.as_deref().and_then(canonical);
        let ids = (self.id.as_deref().and_then(unique), id(&self.correlation_id), id(&self.causation_id));
        let party = |name: &Option<Cow<'_, str>>| name.as_deref().and_then(|name| Party::new(name).ok());
        let of_relay = (|| {
            let (Some(_), Some(_), Some(_)) = ids else { return None };
            let schema_version = self.schema_version.as_deref()?.parse().ok().filter(|version| *version > 0)?;
            let [position, version] = [&self.position, &self.version].map(|value| match value.as_deref() {
                Some(value) => value.parse::<i64>().ok().filter(|number| *number > 0),
                None => Some(0),
            });
            let position = Position(position?);
            let version = Version(version?);
            let lane = self.lane.as_deref().filter(|lane| position > Position::START && is_lane(lane));
            (lane.is_some() || self.lane.is_none()).then(|| RelayAttributes {
                schema_version,
                position,
                version,
                lane: lane.map(Arc::from),
                actor: party(&self.actor),
                tenant: party(&self.tenant),
            })
        })();
        if of_relay.is_none() {
            for (name, value) in [
                (attribute::POSITION, self.position.take()),
                (attribute::VERSION, self.version.take()),
                (attribute::SCHEMA_VERSION, self.schema_version.take()),
                (attribute::LANE, self.lane.take()),
                (attribute::CORRELATION, self.correlation_id.take_if(|_| ids.1.is_none())),
                (attribute::CAUSATION, self.causation_id.take_if(|_| ids.2.is_none())),
            ] {
                self.extensions.extend(value.map(|value| (name.to_owned(), value.into_owned())));
            }
        }
        // An attribute whose value is not a valid actor or tenant stays an extension, even in a message of a relay.
        for (name, value) in [(attribute::ACTOR, self.actor.take()), (attribute::TENANT, self.tenant.take())] {
            let is_known = of_relay.is_some() && party(&value).is_some();
            self.extensions.extend(value.filter(|_| !is_known).map(|value| (name.to_owned(), value.into_owned())));
        }
        of_relay
    }
}

/// The attributes that a relay adds to the attributes of CloudEvents.
struct RelayAttributes {
    schema_version: i32,
    position: Position,
    version: Version,
    lane: Option<Arc<str>>,
    actor: Option<Party>,
    tenant: Option<Party>,
}

/// Parses a UUID in the form that Annals writes. A UUID in any other form is treated as text, because two different
/// strings must remain two different ids.
fn canonical(text: &str) -> Option<Uuid> {
    const CANONICAL: usize = 36;
    (text.len() == CANONICAL).then(|| Uuid::try_parse(text).ok()).flatten()
}

/// Parses the id of an event, if the id is a UUID. The nil UUID is treated as text, because many producers write it
/// when they have no id.
fn unique(text: &str) -> Option<Uuid> {
    canonical(text).filter(|id| !id.is_nil())
}

/// Returns whether a string is the name of a relay's lane, which consists of the number of the lane and the name of the
/// relay's log (16 hexadecimal digits).
fn is_lane(text: &str) -> bool {
    const LOG: usize = 16;
    let Some((number, log)) = text.split_once('@') else { return false };
    number.parse::<u32>().is_ok_and(|parsed| parsed.to_string() == number)
        && log.len() == LOG
        && log.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// All values of `traceparent` and `tracestate`. Only all values together show whether the trace context is valid.
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
    let mut content_type = None;
    for header in record.headers().into_iter().flat_map(Headers::iter) {
        // A header without a value counts as absent.
        let Some(value) = header.value else { continue };
        // HTTP gateways write names such as `Ce-Id` in upper or lower case.
        let key = match header.key.bytes().any(|byte| byte.is_ascii_uppercase()) {
            true => Cow::Owned(header.key.to_ascii_lowercase()),
            false => Cow::Borrowed(header.key),
        };
        let name = key.strip_prefix("ce_");
        let value = match std::str::from_utf8(value) {
            Ok(value) => value,
            // Attributes must be UTF-8.
            Err(_) if name.is_some() => return Err(format!("header {} is not UTF-8", header.key)),
            // A trace header that is not UTF-8 counts as invalid, not as absent.
            Err(_) if matches!(&*key, attribute::TRACEPARENT | attribute::TRACESTATE) => "\0",
            Err(_) => continue,
        };
        match (&*key, name) {
            (_, Some(name)) => attributes.set(name, value.into()),
            ("content-type", _) => content_type = Some(MediaType::of(value)),
            (attribute::TRACEPARENT | attribute::TRACESTATE, _) => transport.add(&key, value.into()),
            _ => {}
        }
    }
    let structured = content_type.as_ref().map_or(Ok(false), MediaType::is_structured)?;
    let data = if structured {
        let payload = record.payload().ok_or("the structured CloudEvent has no value")?;
        // Headers may repeat the attributes of a structured event, but only the event itself counts.
        attributes = Attributes::default();
        read_structured(payload, &mut attributes)?
    } else {
        if let Some(media_type) = &content_type {
            attributes.data_content_type = Some(media_type.whole.into());
        }
        data_of_bytes(record.payload().unwrap_or_default(), &mut attributes)?
    };
    let key = record.key().map(|key| String::from_utf8(key.to_vec()).unwrap_or_else(|_| hex(key)));
    // Transport headers describe the nearest hop; the event's attributes describe its origin.
    let trace = transport.context().or_else(|| attributes.trace.context());
    message(attributes, key.as_deref(), data, trace, record.timestamp().to_millis())
}

/// A media type, such as `application/json; charset=utf-8`.
struct MediaType<'r> {
    whole: &'r str,
    /// The type without parameters, in lower case.
    essence: String,
}

impl<'r> MediaType<'r> {
    fn of(whole: &'r str) -> Self {
        Self { whole, essence: whole.split(';').next().unwrap_or_default().trim().to_ascii_lowercase() }
    }

    fn is_json(&self) -> bool {
        matches!(&*self.essence, "application/json" | "text/json") || self.essence.ends_with("+json")
    }

    /// Returns whether the value is a structured CloudEvent in JSON. Returns an error for an event in any other format.
    fn is_structured(&self) -> Result<bool, String> {
        if self.essence == STRUCTURED {
            let mut parameters = self.whole.split(';').skip(1).filter_map(|parameter| parameter.split_once('='));
            let charset = parameters.find(|(name, _)| name.trim().eq_ignore_ascii_case("charset"));
            let charset = charset.map(|(_, charset)| charset.trim().trim_matches('"').to_ascii_lowercase());
            return match charset.as_deref() {
                None | Some("utf-8" | "utf8" | "us-ascii") => Ok(true),
                Some(other) => Err(format!("a structured CloudEvent must be JSON in UTF-8, not in {other}")),
            };
        }
        if self.essence.starts_with(BATCH) {
            return Err(format!("{} is a batch of CloudEvents: send each event as its own record", self.essence));
        }
        if self.essence.starts_with(ANY_STRUCTURED) {
            return Err(format!("CloudEvents in format {} are not supported, only in {STRUCTURED}", self.essence));
        }
        Ok(false)
    }
}

/// Converts the bytes of a message to JSON text. JSON stays as it is, other text becomes a JSON string, and other bytes
/// become a JSON string in base64. Data that is declared as JSON must be valid JSON.
fn data_of_bytes(bytes: &[u8], attributes: &mut Attributes<'_>) -> Result<Arc<str>, String> {
    if bytes.is_empty() {
        return Ok("null".into());
    }
    let text = std::str::from_utf8(bytes);
    let declared = attributes.data_content_type.as_deref().map(MediaType::of);
    let is_json = declared.as_ref().map(MediaType::is_json);
    if is_json != Some(false) {
        let json = match text {
            Ok(text) => {
                serde_json::from_str::<&RawValue>(text).map_err(|error| format!("the value is not JSON: {error}"))
            }
            Err(_) => Err("the value is not UTF-8".to_owned()),
        };
        match json {
            Ok(_) => return Ok(text.unwrap_or_default().into()),
            Err(reason) if is_json == Some(true) => return Err(reason),
            Err(_) => {}
        }
    }
    Ok(match text {
        Ok(text) => serde_json::Value::from(text),
        Err(_) => {
            attributes.extensions.insert(attribute::DATA_ENCODING.to_owned(), "base64".to_owned());
            serde_json::Value::from(BASE64_STANDARD.encode(bytes))
        }
    }
    .to_string()
    .into())
}

/// Parses an event that is one JSON object. A member with the value null counts as absent.
fn read_structured(payload: &[u8], attributes: &mut Attributes<'_>) -> Result<Arc<str>, String> {
    let payload = std::str::from_utf8(payload).map_err(|_| "the value is not UTF-8")?;
    let members: BTreeMap<String, &RawValue> =
        serde_json::from_str(payload).map_err(|error| format!("not a structured CloudEvent: {error}"))?;
    let mut data = None;
    let mut bytes = None;
    for (name, value) in members.iter().filter(|(_, value)| value.get() != "null") {
        match &**name {
            "data" => data = Some(value.get()),
            "data_base64" => {
                let text = serde_json::from_str::<String>(value.get()).map_err(|_| "data_base64 is not a string")?;
                bytes = Some(
                    BASE64_STANDARD.decode(text).map_err(|error| format!("data_base64 cannot be decoded: {error}"))?,
                );
            }
            attribute::DATA_CONTENT_TYPE => attributes.data_content_type = Some(text(name, value)?.into()),
            _ => attributes.set(name, text(name, value)?.into()),
        }
    }
    match (data, bytes) {
        (Some(_), Some(_)) => Err("not a CloudEvent: both data and data_base64 are present".into()),
        (Some(data), None) => Ok(data.into()),
        (None, Some(bytes)) => data_of_bytes(&bytes, attributes),
        (None, None) => Ok("null".into()),
    }
}

/// Returns the text of an attribute in JSON: a string or, for an extension, a 32-bit integer or a boolean.
fn text(name: &str, value: &RawValue) -> Result<String, String> {
    if let Ok(text) = serde_json::from_str::<String>(value.get()) {
        return Ok(text);
    }
    let is_of_the_specification = matches!(
        name,
        "specversion" | "id" | "source" | "type" | "subject" | "time" | "dataschema" | attribute::DATA_CONTENT_TYPE
    );
    let is_scalar = matches!(value.get(), "true" | "false") || value.get().parse::<i32>().is_ok();
    match is_of_the_specification {
        false if is_scalar => Ok(value.get().to_owned()),
        false => Err(format!("not a CloudEvent: attribute {name} is not a string, integer or boolean")),
        true => Err(format!("not a CloudEvent: attribute {name} is not a string")),
    }
}

fn message(
    mut attributes: Attributes<'_>,
    key: Option<&str>,
    data: Arc<str>,
    trace: Option<TraceContext>,
    at: Option<i64>,
) -> Result<Message, String> {
    fn required<'r>(name: &str, value: Option<Cow<'r, str>>) -> Result<Cow<'r, str>, String> {
        value
            .filter(|value| !value.is_empty())
            .ok_or_else(|| format!("not a CloudEvent: attribute {name} is missing or empty"))
    }
    let relayed = attributes.relayed();
    // The check does not apply to relayed messages, because their stream ids and extensions may be any text.
    if let Some(violation) = attributes.violation.filter(|_| relayed.is_none()) {
        return Err(violation);
    }
    let specversion = required("specversion", attributes.specversion)?;
    if specversion != "1.0" {
        return Err(format!("CloudEvents version {specversion:?} is not supported, only 1.0"));
    }
    let id = required("id", attributes.id)?;
    let source = required("source", attributes.source)?;
    let type_name = required("type", attributes.type_name)?;
    // An id from another producer may be any text, and is unique only within its source.
    let id = unique(&id).unwrap_or_else(|| named_id(Uuid::NAMESPACE_URL, &format!("{source} {id}")));
    let time = match attributes.time {
        Some(time) => {
            DateTime::parse_from_rfc3339(&time).map_err(|error| format!("attribute time {time:?}: {error}"))?.into()
        }
        None => at.and_then(DateTime::from_timestamp_millis).unwrap_or(DateTime::UNIX_EPOCH),
    };
    let key: Arc<str> = match (key, &attributes.subject) {
        (Some(key), _) => key.into(),
        (None, Some(subject)) => subject.as_ref().into(),
        (None, None) => id.to_string().into(),
    };
    // The subject usually equals the key, so the key and the subject share one allocation.
    let subject = attributes.subject.filter(|subject| **subject != *key).map_or_else(|| key.clone(), Into::into);
    let media_type = attributes.data_content_type.as_deref().map(MediaType::of);
    let not_plain_json = media_type.filter(|media_type| media_type.essence != "application/json");
    attributes.extensions.extend(
        not_plain_json.map(|media_type| (attribute::DATA_CONTENT_TYPE.to_owned(), media_type.whole.to_owned())),
    );
    let caused_by = |id: &Option<Cow<'_, str>>| id.as_deref().and_then(canonical);
    let relayed = relayed.unwrap_or(RelayAttributes {
        schema_version: 1,
        position: Position(0),
        version: Version(0),
        lane: None,
        actor: None,
        tenant: None,
    });
    Ok(Message {
        id,
        type_name: type_name.into(),
        schema_version: relayed.schema_version,
        source: source.into(),
        subject,
        key,
        data,
        metadata: Metadata {
            correlation_id: caused_by(&attributes.correlation_id).unwrap_or(id),
            causation_id: caused_by(&attributes.causation_id).unwrap_or(id),
            trace,
            actor: relayed.actor,
            tenant: relayed.tenant,
            unknown: UnknownFields::default(),
        },
        time,
        position: relayed.position,
        version: relayed.version,
        lane: relayed.lane,
        extensions: attributes.extensions,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rdkafka::message::{OwnedMessage, Timestamp};
    use serde_json::{Value, json};

    use super::*;

    const ID: &str = "5f0c8a1e-6d3b-4c59-9f57-0f6f2f8f2b11";
    const REQUIRED: [(&str, &str); 4] =
        [("ce_specversion", "1.0"), ("ce_id", "1"), ("ce_source", "/other"), ("ce_type", "t")];

    fn record(headers: &[(&str, Option<&[u8]>)], key: Option<&[u8]>, value: Option<&[u8]>) -> OwnedMessage {
        let headers = headers
            .iter()
            .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: *value }));
        let [key, value] = [key, value].map(|bytes| bytes.map(<[u8]>::to_vec));
        OwnedMessage::new(value, key, "topic".into(), Timestamp::CreateTime(1_000), 0, 0, Some(headers))
    }

    /// Decodes an event in binary mode. `headers` replace or extend the required headers.
    fn binary(headers: &[(&str, &str)], value: &[u8]) -> Result<Message, Undecodable> {
        let required = REQUIRED.iter().filter(|(name, _)| headers.iter().all(|(known, _)| known != name));
        let all: Vec<_> = required.chain(headers).map(|(name, value)| (*name, Some(value.as_bytes()))).collect();
        decode(&record(&all, Some(b"key"), Some(value)))
    }

    /// Decodes an event in structured mode. `members` replace or extend the required members.
    fn structured(members: Value) -> Result<Message, Undecodable> {
        let mut event = json!({ "specversion": "1.0", "id": "1", "source": "/other", "type": "t" });
        event.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
        let media_type = ("content-type", Some(&b"application/cloudevents+json; charset=UTF-8"[..]));
        decode(&record(&[media_type], None, Some(event.to_string().as_bytes())))
    }

    #[test]
    fn data_in_binary_mode() {
        for (content_type, value, data, extensions) in [
            (Some("application/json"), &b"{\"a\": 1.0}"[..], Ok("{\"a\": 1.0}"), json!({})),
            (Some("application/json; charset=utf-8"), b"[]", Ok("[]"), json!({})),
            (Some("Application/JSON"), b"1", Ok("1"), json!({})),
            (Some("application/json"), b"", Ok("null"), json!({})),
            (Some("application/json"), b"{", Err("not JSON"), json!({})),
            (Some("application/json"), b"\xff", Err("not UTF-8"), json!({})),
            (
                Some("application/vnd.shop+json"),
                b"{}",
                Ok("{}"),
                json!({"datacontenttype": "application/vnd.shop+json"}),
            ),
            (Some("text/json"), b"{}", Ok("{}"), json!({"datacontenttype": "text/json"})),
            (Some("text/plain"), b"hello", Ok("\"hello\""), json!({"datacontenttype": "text/plain"})),
            (Some("text/plain"), b"1", Ok("\"1\""), json!({"datacontenttype": "text/plain"})),
            (
                Some("text/xml; charset=utf-8"),
                b"<a/>",
                Ok("\"<a/>\""),
                json!({"datacontenttype": "text/xml; charset=utf-8"}),
            ),
            (
                Some("application/octet-stream"),
                b"\xff\x00",
                Ok("\"/wA=\""),
                json!({"datacontenttype": "application/octet-stream", "datacontentencoding": "base64"}),
            ),
            (None, b"{\"a\":1}", Ok("{\"a\":1}"), json!({})),
            (None, b"hello", Ok("\"hello\""), json!({})),
            (None, b"\xff\x00", Ok("\"/wA=\""), json!({"datacontentencoding": "base64"})),
            (None, b"", Ok("null"), json!({})),
            (Some("application/cloudevents-batch+json"), b"[]", Err("batch"), json!({})),
            (
                Some("application/cloudevents+avro"),
                b"{}",
                Err("application/cloudevents+avro are not supported"),
                json!({}),
            ),
            (Some("application/cloudevents+json; charset=utf-16"), b"{}", Err("not in utf-16"), json!({})),
        ] {
            let headers: Vec<_> = content_type.iter().map(|value| ("content-type", *value)).collect();
            let case = format!("{content_type:?} {value:?}");
            match (binary(&headers, value), data) {
                (Ok(message), Ok(data)) => {
                    assert_eq!(&*message.data, data, "{case}");
                    assert_eq!(json!(message.extensions), extensions, "{case}");
                }
                (Err(refused), Err(reason)) => assert!(refused.reason.contains(reason), "{case}: {}", refused.reason),
                (read, _) => panic!("{case}: {read:?}"),
            }
        }
        let tombstone = record(&REQUIRED.map(|(name, value)| (name, Some(value.as_bytes()))), Some(b"key"), None);
        assert_eq!(&*decode(&tombstone).unwrap().data, "null");
    }

    #[test]
    fn attributes_in_binary_mode() {
        for (headers, reason) in [
            (&[("ce_specversion", "0.3")][..], Err("\"0.3\" is not supported")),
            (&[("ce_id", "")], Err("attribute id is missing")),
            (&[("ce_source", "")], Err("attribute source is missing")),
            (&[("ce_type", "")], Err("attribute type is missing")),
            (&[("ce_subject", "")], Err("\"subject\" is present but empty")),
            (&[("ce_time", "")], Err("\"time\" is present but empty")),
            (&[("ce_dataschema", "")], Err("\"dataschema\" is present but empty")),
            (&[("ce_my-ext", "1")], Err("\"my-ext\" has a name")),
            (&[("ce_myext", "a\u{7}b")], Err("\"myext\" has a control character")),
            (&[("ce_myext", "")], Ok(("myext", ""))),
            (&[("CE_Myext", "1")], Ok(("myext", "1"))),
            (&[("ce_myext", "a%20b")], Ok(("myext", "a%20b"))),
            (&[("ce_dataschema", "urn:x")], Ok(("dataschema", "urn:x"))),
            (&[("Content-Type", "text/plain")], Ok(("datacontenttype", "text/plain"))),
        ] {
            match (binary(headers, b"1"), reason) {
                (Ok(message), Ok((name, value))) => assert_eq!(message.extensions[name], value, "{headers:?}"),
                (Err(refused), Err(reason)) => assert!(refused.reason.contains(reason), "{headers:?}: {refused}"),
                (read, _) => panic!("{headers:?}: {read:?}"),
            }
        }
        for time in [
            "2026-01-02T03:04:05Z",
            "2026-01-02t03:04:05z",
            "2026-01-02T05:04:05+02:00",
            "2026-01-02T03:04:05.000-00:00",
        ] {
            let message = binary(&[("ce_time", time)], b"1").unwrap();
            assert_eq!(message.time.to_rfc3339(), "2026-01-02T03:04:05+00:00", "{time}");
        }
        // A header without a value counts as absent, and so does a header that is neither an attribute nor text.
        let required = REQUIRED.map(|(name, value)| (name, Some(value.as_bytes())));
        let more = [required.as_slice(), &[("ce_subject", None), ("ce_time", None), ("x", Some(b"\xff"))]].concat();
        let message = decode(&record(&more, Some(b"\xff\xfe"), Some(b"1"))).unwrap();
        assert_eq!((&*message.key, &*message.subject, message.time.timestamp()), ("fffe", "fffe", 1));
    }

    #[test]
    fn structured_mode() {
        for (members, data, extensions) in [
            (json!({"data": {"a": 1}}), Ok("{\"a\":1}"), json!({})),
            (json!({"data": "text"}), Ok("\"text\""), json!({})),
            (json!({"data": null}), Ok("null"), json!({})),
            (json!({}), Ok("null"), json!({})),
            (json!({"data_base64": "eyJhIjoxfQ=="}), Ok("{\"a\":1}"), json!({})),
            (json!({"data_base64": "eyJhIjoxfQ==", "datacontenttype": "application/json"}), Ok("{\"a\":1}"), json!({})),
            (json!({"data_base64": "/w==", "datacontenttype": "application/json"}), Err("not UTF-8"), json!({})),
            (
                json!({"data_base64": "/wA=", "datacontenttype": "image/png"}),
                Ok("\"/wA=\""),
                json!({"datacontenttype": "image/png", "datacontentencoding": "base64"}),
            ),
            (
                json!({"data": "<a/>", "datacontenttype": "text/xml"}),
                Ok("\"<a/>\""),
                json!({"datacontenttype": "text/xml"}),
            ),
            (json!({"data": null, "data_base64": "MQ=="}), Ok("1"), json!({})),
            (json!({"data": 1, "data_base64": "MQ=="}), Err("both data and data_base64"), json!({})),
            (json!({"data_base64": "%"}), Err("data_base64"), json!({})),
            (json!({"data_base64": 1}), Err("data_base64"), json!({})),
            (
                json!({"subject": null, "time": null, "myext": null, "dataschema": null, "datacontenttype": null}),
                Ok("null"),
                json!({}),
            ),
            (json!({"id": null}), Err("attribute id is missing"), json!({})),
            (json!({"type": null}), Err("attribute type is missing"), json!({})),
            (json!({"id": 7}), Err("attribute id is not a string"), json!({})),
            (json!({"count": 7, "urgent": true}), Ok("null"), json!({"count": "7", "urgent": "true"})),
            (json!({"ratio": 0.5}), Err("ratio is not a string, integer or boolean"), json!({})),
            (json!({"large": 3_000_000_000_i64}), Err("large is no"), json!({})),
            (json!({"nested": {"a": 1}}), Err("nested is no"), json!({})),
            (json!({"Upper": "a"}), Err("\"Upper\" has a name"), json!({})),
            (json!({"specversion": "1.1"}), Err("\"1.1\" is not supported"), json!({})),
        ] {
            match (structured(members.clone()), data) {
                (Ok(message), Ok(data)) => {
                    assert_eq!(&*message.data, data, "{members}");
                    assert_eq!(json!(message.extensions), extensions, "{members}");
                    assert!(message.key.len() == 36, "{members}: {}", message.key);
                }
                (Err(refused), Err(reason)) => assert!(refused.reason.contains(reason), "{members}: {refused}"),
                (read, _) => panic!("{members}: {read:?}"),
            }
        }
        let content_type = [("content-type", Some(&b"application/cloudevents+json"[..]))];
        let empty = decode(&record(&content_type, Some(b"key"), None)).unwrap_err();
        assert!(empty.reason.contains("has no value"), "{empty}");
        let array = decode(&record(&content_type, Some(b"key"), Some(b"[]"))).unwrap_err();
        assert!(array.reason.contains("not a structured CloudEvent"), "{array}");
    }

    /// The headers that a relay writes on each message.
    const OURS: [(&str, &str); 7] = [
        ("ce_id", ID),
        ("ce_correlationid", ID),
        ("ce_causationid", ID),
        ("ce_schemaversion", "2"),
        ("ce_position", "7"),
        ("ce_streamversion", "3"),
        ("ce_lane", "0@0123456789abcdef"),
    ];

    #[test]
    fn relay_attributes_are_ignored_unless_complete() {
        let ours = binary(&OURS, b"1").unwrap();
        assert_eq!((ours.position, ours.version, ours.schema_version), (Position(7), Version(3), 2));
        assert_eq!(ours.lane.as_deref(), Some("0@0123456789abcdef"));
        assert_eq!(ours.extensions, BTreeMap::new());
        let without_lane = binary(&OURS[..6], b"1").unwrap();
        assert_eq!((without_lane.position, without_lane.lane), (Position(7), None), "redriven");
        for (name, value) in [
            ("ce_id", "7"),
            ("ce_id", "00000000-0000-0000-0000-000000000000"),
            ("ce_correlationid", "c-1"),
            ("ce_causationid", "5F0C8A1E6D3B4C599F570F6F2F8F2B11"),
            ("ce_schemaversion", "draft"),
            ("ce_schemaversion", "0"),
            ("ce_position", "48.1,11.5"),
            ("ce_position", "0"),
            ("ce_streamversion", "-1"),
            ("ce_lane", "fast"),
            ("ce_lane", "7"),
            ("ce_lane", "0@log"),
            ("ce_lane", "00@0123456789abcdef"),
            ("ce_lane", "0@0123456789ABCDEF"),
            ("ce_lane", ""),
        ] {
            let theirs = OURS.map(|(known, ours)| (known, if known == name { value } else { ours }));
            let message = binary(&theirs, b"1").unwrap();
            let relayed = (message.position, message.version, message.schema_version, message.lane);
            assert_eq!(relayed, (Position(0), Version(0), 1, None), "{name}: {value}");
            for (known, value) in theirs.iter().filter(|(known, _)| !known.ends_with("id")) {
                let kept = message.extensions.get(known.strip_prefix("ce_").unwrap());
                assert_eq!(kept.map(String::as_str), Some(*value), "{name}");
            }
        }
        let alone = binary(&[("ce_position", "7"), ("ce_lane", "0@0123456789abcdef")], b"1").unwrap();
        assert_eq!((alone.position, alone.lane), (Position(0), None));
    }

    #[test]
    fn actor_and_tenant_are_taken_from_relays_only() {
        let parties = |headers: &[(&str, &str)]| {
            let message = binary(headers, b"1").unwrap();
            let names = [message.metadata.actor, message.metadata.tenant].map(|party| party.map(String::from));
            (names, message.position, message.extensions.into_values().collect::<Vec<_>>())
        };
        let known = [("ce_actor", "user:ann"), ("ce_tenant", "t 1")];
        let both = [Some("user:ann".to_owned()), Some("t 1".to_owned())];
        assert_eq!(parties(&[&OURS[..], &known].concat()), (both, Position(7), vec![]));
        let theirs = vec!["user:ann".to_owned(), "t 1".to_owned()];
        assert_eq!(parties(&known), ([None, None], Position(0), theirs));
        // A name that this build refuses does not make the message another one.
        let long = "a".repeat(201);
        let odd = [&OURS[..], &[("ce_actor", &*long), ("ce_tenant", "")]].concat();
        assert_eq!(parties(&odd), ([None, None], Position(7), vec![long.clone(), String::new()]));
    }

    #[test]
    fn ids_are_unique_for_their_source() {
        let id = |source: &str, id: &str| binary(&[("ce_source", source), ("ce_id", id)], b"1").unwrap().id;
        assert_eq!(id("a", ID).to_string(), ID);
        assert_ne!(id("a", "1"), id("b", "1"));
        assert_ne!(id("a", "00000000-0000-0000-0000-000000000000"), id("b", "00000000-0000-0000-0000-000000000000"));
        assert_ne!(id("a", &ID.replace('-', "")).to_string(), ID, "another text");
    }

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const OTHER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

    /// Decodes an event with these headers.
    fn traced(headers: &[(&str, &[u8])], structured: Option<&str>) -> Message {
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

    /// A `traceparent` and a `tracestate`.
    type Carried<'t> = (&'t str, Option<&'t str>);

    fn carried(message: &Message) -> Option<Carried<'_>> {
        message.metadata.trace.as_ref().map(|trace| (trace.traceparent(), trace.tracestate()))
    }

    #[test]
    fn trace_context_is_valid_or_absent() {
        type Headers<'a> = &'a [(&'a str, &'a [u8])];
        let cases: &[(Headers, Option<Carried>)] = &[
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
            let message = traced(headers, None);
            assert_eq!(carried(&message), *expected, "{headers:?}");
            assert!(message.extensions.is_empty(), "{message:?}");
        }
        let event = format!(
            r#"{{"specversion":"1.0","id":"1","source":"till","type":"till.rang","traceparent":"{PARENT}","tracestate":"a=1"}}"#
        );
        assert_eq!(carried(&traced(&[], Some(&event))), Some((PARENT, Some("a=1"))));
        assert_eq!(carried(&traced(&[("traceparent", OTHER.as_bytes())], Some(&event))), Some((OTHER, None)));
    }
}
