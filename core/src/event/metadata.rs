//! The cause of an event, and the context in which it was caused.

use std::{fmt::Write, sync::Arc};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, MapAccess, Visitor},
};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::event::{party::Party, trace_context::TraceContext};

/// The initial capacity in bytes of the string that holds metadata JSON. Metadata with a `traceparent` fits into this
/// capacity.
const METADATA_BYTES: usize = 200;

/// The cause of an event, and the context in which it was caused. The framework copies metadata from each message to the
/// effects of that message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "KnownMetadata", into = "KnownMetadata")]
pub struct Metadata {
    /// The correlation id, which is the same for everything that one request caused.
    pub correlation_id: Uuid,
    /// The id of the command or message that caused this event.
    pub causation_id: Uuid,
    /// The W3C trace context, if there is one.
    pub trace: Option<TraceContext>,
    /// The user, service or operator who made the request, if that is known.
    pub actor: Option<Party>,
    /// The tenant for whom the request was made, if the service has tenants.
    pub tenant: Option<Party>,
    /// The fields that this build does not know.
    pub unknown: UnknownFields,
}

/// The fields of stored metadata that this build does not know, such as the fields of a later build, and an actor or a
/// tenant whose stored name is not valid. The fields of an event survive if the event is read and written again.
/// Effects of the event do not get these fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnknownFields(
    /// The fields as they are stored, each after a comma.
    Option<Arc<str>>,
);

/// Metadata in JSON that is part of a document, without the unknown fields. The trace context, the actor and the tenant
/// may be invalid.
#[derive(Serialize, Deserialize)]
struct KnownMetadata {
    #[serde(default)]
    correlation_id: Uuid,
    #[serde(default)]
    causation_id: Uuid,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    traceparent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tracestate: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    actor: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
}

impl From<KnownMetadata> for Metadata {
    fn from(known: KnownMetadata) -> Self {
        let KnownMetadata { correlation_id, causation_id, traceparent, tracestate, actor, tenant } = known;
        Self {
            correlation_id,
            causation_id,
            trace: TraceContext::parse(traceparent.as_deref(), tracestate.as_deref()),
            actor: actor.and_then(|name| Party::new(&name).ok()),
            tenant: tenant.and_then(|name| Party::new(&name).ok()),
            unknown: UnknownFields::default(),
        }
    }
}

impl From<Metadata> for KnownMetadata {
    fn from(metadata: Metadata) -> Self {
        let Metadata { correlation_id, causation_id, trace, actor, tenant, .. } = metadata;
        let text = |text: &str| text.to_owned();
        Self {
            correlation_id,
            causation_id,
            traceparent: trace.as_ref().map(|trace| text(trace.traceparent())),
            tracestate: trace.as_ref().and_then(TraceContext::tracestate).map(text),
            actor: actor.map(String::from),
            tenant: tenant.map(String::from),
        }
    }
}

/// The name of a stored field. The names that most events have are read without a copy.
enum Field {
    Correlation,
    Causation,
    Traceparent,
    Tracestate,
    Other(String),
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;

        impl Visitor<'_> for Name {
            type Value = Field;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the name of a field")
            }

            fn visit_str<E: Error>(self, name: &str) -> Result<Field, E> {
                Ok(match name {
                    "correlation_id" => Field::Correlation,
                    "causation_id" => Field::Causation,
                    "traceparent" => Field::Traceparent,
                    "tracestate" => Field::Tracestate,
                    other => Field::Other(other.to_owned()),
                })
            }
        }

        deserializer.deserialize_identifier(Name)
    }
}

/// Metadata as stored with an event, with all fields.
struct StoredMetadata(Metadata);

impl<'de> Deserialize<'de> for StoredMetadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = StoredMetadata;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut fields: M) -> Result<StoredMetadata, M::Error> {
                let mut known = Metadata::default();
                let mut parent = None::<String>;
                let mut state = None::<String>;
                let mut unknown = String::new();
                while let Some(field) = fields.next_key::<Field>()? {
                    match field {
                        Field::Correlation => known.correlation_id = fields.next_value()?,
                        Field::Causation => known.causation_id = fields.next_value()?,
                        Field::Traceparent => parent = fields.next_value()?,
                        Field::Tracestate => state = fields.next_value()?,
                        Field::Other(name) => {
                            let value = fields.next_value::<&RawValue>()?.get();
                            let party = || serde_json::from_str::<Party>(value).ok();
                            match &*name {
                                "actor" if let Some(actor) = party() => known.actor = Some(actor),
                                "tenant" if let Some(tenant) = party() => known.tenant = Some(tenant),
                                // Writing to memory does not fail.
                                _ => _ = write!(unknown, ",{}:{value}", serde_json::Value::from(name)),
                            }
                        }
                    }
                }
                known.trace = TraceContext::parse(parent.as_deref(), state.as_deref());
                known.unknown = UnknownFields((!unknown.is_empty()).then(|| unknown.into()));
                Ok(StoredMetadata(known))
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

impl Metadata {
    /// Returns the metadata for the first command of a request. The id of this command is also the correlation id.
    pub fn of_request(command_id: Uuid) -> Self {
        Self { correlation_id: command_id, causation_id: command_id, ..Self::default() }
    }

    /// Returns the metadata for the effects of a message. The message has the id `message_id` and carries this
    /// metadata.
    pub fn caused_by(&self, message_id: Uuid) -> Self {
        Self { causation_id: message_id, unknown: UnknownFields::default(), ..self.clone() }
    }

    /// Parses stored metadata. If the JSON does not parse, returns empty metadata, so that no row can stop a reader.
    pub fn from_json(text: &str) -> Self {
        serde_json::from_str(text).map_or_else(|_| Self::default(), |StoredMetadata(metadata)| metadata)
    }

    /// Returns the JSON to store. The JSON is built by hand for speed: every event passes through this function, and
    /// the fields are few and simple.
    pub fn to_json(&self) -> String {
        let mut buffer = Uuid::encode_buffer();
        let mut json = String::with_capacity(METADATA_BYTES);
        json += r#"{"correlation_id":""#;
        json += self.correlation_id.hyphenated().encode_lower(&mut buffer);
        json += r#"","causation_id":""#;
        json += self.causation_id.hyphenated().encode_lower(&mut buffer);
        json += "\"";
        if let Some(trace) = &self.trace {
            // A valid `traceparent` contains no character that JSON must escape.
            json += r#","traceparent":""#;
            json += trace.traceparent();
            json += "\"";
            if let Some(state) = trace.tracestate() {
                json += r#","tracestate":"#;
                json += &serde_json::Value::from(state).to_string();
            }
        }
        for (name, party) in [("actor", &self.actor), ("tenant", &self.tenant)] {
            if let Some(party) = party {
                // Writing to memory does not fail.
                _ = write!(json, r#","{name}":{}"#, serde_json::Value::from(party.as_str()));
            }
        }
        json += self.unknown.0.as_deref().unwrap_or_default();
        json + "}"
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn metadata_round_trips_as_json_without_invalid_trace() {
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        for states in [&[][..], &["a=\"1\"\\", "b@c=2"]] {
            let trace = TraceContext::parse([parent], states.iter().copied());
            let actor = Party::new("user \"ann\" \\ ü").ok();
            let tenant = Party::new("shop 7").ok().filter(|_| states.is_empty());
            let metadata = Metadata { trace, actor, tenant, ..Metadata::of_request(Uuid::from_u128(1)) };
            let metadata = metadata.caused_by(Uuid::from_u128(2));
            let json = metadata.to_json();
            assert_eq!(json, serde_json::to_string(&metadata).unwrap());
            assert_eq!(serde_json::from_str::<Metadata>(&json).unwrap(), metadata);
            assert_eq!(Metadata::from_json(&json), metadata);
            assert_eq!(json.contains(r#""tracestate":"a=\"1\"\\,b@c=2""#), !states.is_empty(), "{json}");
        }
        let id = Uuid::from_u128(1);
        for trace in ["00-x", &parent.replace('4', "0").replace(|c: char| c.is_ascii_hexdigit(), "0"), "\\u0000"] {
            let json = format!(r#"{{"correlation_id":"{id}","traceparent":"{trace}","tracestate":"a=1"}}"#);
            let expected = Metadata { correlation_id: id, ..Metadata::default() };
            assert_eq!(Metadata::from_json(&json), expected, "{json}");
        }
    }

    #[test]
    fn unknown_fields_survive_and_are_not_passed_on() {
        let [one, two] = [1, 2].map(Uuid::from_u128);
        let known = format!(r#"{{"correlation_id":"{one}","causation_id":"{two}""#);
        for unknown in [
            r#","region":"eu""#,
            r#","a\"b":{"x": [1, 1e400, 123456789012345678901234567890.10]},"c":null"#,
            // Names that no build accepts are kept like unknown fields.
            r#","actor":"","tenant":7"#,
            r#","actor":"a\u0007b""#,
        ] {
            let stored = format!("{known}{unknown}}}");
            let metadata = Metadata::from_json(&stored);
            assert_eq!((metadata.correlation_id, metadata.causation_id), (one, two), "{stored}");
            assert_eq!((&metadata.actor, &metadata.tenant), (&None, &None));
            assert_eq!(metadata.to_json(), stored);
            assert_eq!(metadata.caused_by(two).to_json(), format!("{known}}}"));
        }
        // The fields may be in any order.
        let stored = format!(r#"{{"new":1,"tenant":"t","causation_id":"{two}","correlation_id":"{one}"}}"#);
        let metadata = Metadata::from_json(&stored);
        assert_eq!(metadata.to_json(), format!(r#"{known},"tenant":"t","new":1}}"#));
        assert_eq!(metadata.caused_by(two).to_json(), format!(r#"{known},"tenant":"t"}}"#));
    }
}
