//! `#[derive(Event)]`: names, exact JSON, upcasting and rejected definitions.
#![allow(clippy::unwrap_used)]

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fmt::Debug,
};

use annals::{Event, EventError, EventType};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "order")]
enum OrderEvent {
    #[event(version = 3, upcasters(add_currency, steps::Names::split::<' '>))]
    Placed {
        order_id: String,
        cents: i64,
        currency: String,
        first_name: String,
        last_name: String,
    },
    #[event(name = "order.confirmed-by-hand")]
    Confirmed {
        order_id: String,
    },
    Imported(ImportedOrder),
    #[event(version = 2, upcasters(Self::close))]
    ClosedForGood,
    Reopened {},
}

/// A newtype variant often has the same name as its payload type, so both names must resolve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ImportedOrder {
    source_system: String,
    lines: Vec<(u64, String)>,
}

fn add_currency(mut old: Value) -> Result<Value, String> {
    let fields = old.as_object_mut().ok_or("not an object")?;
    fields.insert("currency".to_owned(), json!("EUR"));
    Ok(old)
}

mod steps {
    use super::{Cow, Value};

    pub struct Names;

    impl Names {
        /// An upcaster's error may be any `Display` type. The error type here differs from the error type of the other
        /// upcaster.
        pub fn split<const AT: char>(mut old: Value) -> Result<Value, Cow<'static, str>> {
            let name = old["name"].as_str().ok_or("`name` is no text")?.to_owned();
            let (first, last) = name.split_once(AT).ok_or_else(|| format!("{name:?} is one word"))?;
            old["first_name"] = first.into();
            old["last_name"] = last.into();
            Ok(old)
        }
    }
}

impl OrderEvent {
    fn close(old: Value) -> Result<Value, std::convert::Infallible> {
        Ok(json!({ "was": old }))
    }
}

fn placed() -> OrderEvent {
    OrderEvent::Placed {
        order_id: "o-1".to_owned(),
        cents: 1250,
        currency: "EUR".to_owned(),
        first_name: "Ada".to_owned(),
        last_name: "Lovelace".to_owned(),
    }
}

#[track_caller]
fn stores<E: Event + Debug + PartialEq>(event: &E, name: &str, version: i32, json: &str) {
    assert_eq!((event.type_name(), event.schema_version()), (name, version));
    assert_eq!(event.encode().unwrap(), json);
    assert_eq!(E::decode(name, version, json).unwrap().as_ref(), Some(event));
}

#[track_caller]
fn undecodable<E: Event + Debug>(name: &str, version: i32, json: &str) -> String {
    match E::decode(name, version, json).unwrap_err() {
        EventError::Undecodable { type_name, version: found, reason } => {
            assert_eq!((type_name.as_str(), found), (name, version));
            reason
        }
        other => panic!("expected Undecodable, got {other:?}"),
    }
}

#[test]
fn every_kind_of_variant_round_trips() {
    stores(
        &placed(),
        "order.placed",
        3,
        r#"{"order_id":"o-1","cents":1250,"currency":"EUR","first_name":"Ada","last_name":"Lovelace"}"#,
    );
    let confirmed = OrderEvent::Confirmed { order_id: "o \"1\"\n".to_owned() };
    stores(&confirmed, "order.confirmed-by-hand", 1, r#"{"order_id":"o \"1\"\n"}"#);
    let imported = OrderEvent::Imported(ImportedOrder {
        source_system: "erp".to_owned(),
        lines: vec![(u64::MAX, "tea".to_owned())],
    });
    stores(&imported, "order.imported", 1, r#"{"sourceSystem":"erp","lines":[[18446744073709551615,"tea"]]}"#);
    stores(&OrderEvent::ClosedForGood, "order.closed-for-good", 2, "{}");
    stores(&OrderEvent::Reopened {}, "order.reopened", 1, "{}");
}

#[test]
fn types_are_listed_in_the_order_of_the_enum() {
    let types = [
        ("order.placed", 3),
        ("order.confirmed-by-hand", 1),
        ("order.imported", 1),
        ("order.closed-for-good", 2),
        ("order.reopened", 1),
    ];
    assert_eq!(OrderEvent::TYPES, types.map(|(name, version)| EventType { name, version }));
}

#[test]
fn event_name_without_prefix_is_the_variant() {
    #[derive(Event, Debug, PartialEq)]
    enum Bare {
        HTTPCallFailed,
        r#Type { r#match: u8 },
    }
    stores(&Bare::HTTPCallFailed, "http-call-failed", 1, "{}");
    stores(&Bare::Type { r#match: 7 }, "type", 1, r#"{"match":7}"#);
}

#[test]
fn attributes_may_be_split_and_explicit_names_get_no_prefix() {
    #[derive(Event, Debug, PartialEq)]
    #[event(unknown = "skip")]
    #[event(prefix = "cart")]
    enum Spread {
        #[event(name = "basket.emptied")]
        #[event(version = 1, upcasters())]
        Emptied,
    }
    stores(&Spread::Emptied, "basket.emptied", 1, "{}");
    assert_eq!(Spread::decode("cart.emptied", 1, "{}").unwrap(), None);
}

#[test]
fn old_versions_pass_through_every_later_upcaster() {
    let one = r#"{"order_id":"o-1","cents":1250,"name":"Ada Lovelace"}"#;
    assert_eq!(OrderEvent::decode("order.placed", 1, one).unwrap(), Some(placed()));

    // For version 2, the first upcasting step must not run again, because it would change the currency to EUR.
    let two = r#"{"order_id":"o-1","cents":1250,"name":"Ada Lovelace","currency":"GBP"}"#;
    match OrderEvent::decode("order.placed", 2, two).unwrap() {
        Some(OrderEvent::Placed { currency, last_name, .. }) => {
            assert_eq!((currency.as_str(), last_name.as_str()), ("GBP", "Lovelace"));
        }
        other => panic!("expected Placed, got {other:?}"),
    }

    let closed = OrderEvent::decode("order.closed-for-good", 1, "[]").unwrap();
    assert_eq!(closed, Some(OrderEvent::ClosedForGood));
}

#[test]
fn current_version_passes_through_no_upcaster() {
    #[derive(Event, Debug, PartialEq)]
    enum Tripwire {
        #[event(version = 2, upcasters(explode))]
        Armed { id: u8 },
    }
    fn explode(_: Value) -> Result<Value, &'static str> {
        Err("boom")
    }
    stores(&Tripwire::Armed { id: 1 }, "armed", 2, r#"{"id":1}"#);
    assert_eq!(undecodable::<Tripwire>("armed", 1, r#"{"id":1}"#), "upcaster explode, from 1 to 2: boom");
}

#[test]
fn error_names_the_upcaster_that_failed_and_its_step() {
    assert_eq!(undecodable::<OrderEvent>("order.placed", 1, "[]"), "upcaster add_currency, from 1 to 2: not an object");
    assert_eq!(
        undecodable::<OrderEvent>("order.placed", 1, r#"{"name":"Ada"}"#),
        r#"upcaster steps::Names::split, from 2 to 3: "Ada" is one word"#
    );
    assert_eq!(
        undecodable::<OrderEvent>("order.placed", 2, "{}"),
        "upcaster steps::Names::split, from 2 to 3: `name` is no text"
    );
}

#[test]
fn decode_error_gives_the_reason() {
    let reason = undecodable::<OrderEvent>("order.confirmed-by-hand", 1, "{}");
    assert_eq!(reason, "missing field `order_id` at line 1 column 2");
    let reason = undecodable::<OrderEvent>("order.confirmed-by-hand", 1, r#"{"order_id":1}"#);
    assert_eq!(reason, "invalid type: integer `1`, expected a string at line 1 column 13");
    let reason = undecodable::<OrderEvent>("order.confirmed-by-hand", 1, "true");
    assert!(reason.contains("expected the fields of order.confirmed-by-hand"), "{reason}");
    let reason = undecodable::<OrderEvent>("order.imported", 1, "{}");
    assert!(reason.contains("missing field `sourceSystem`"), "{reason}");

    let reason = undecodable::<OrderEvent>("order.placed", 1, "{");
    assert!(reason.starts_with("EOF while parsing"), "{reason}");
    let reason = undecodable::<OrderEvent>("order.placed", 1, r#"{"name":"Ada Lovelace"}"#);
    assert_eq!(reason, "after the upcasters: missing field `order_id`");
}

#[test]
fn variant_without_fields_accepts_only_objects() {
    for (name, version, event) in
        [("order.closed-for-good", 2, OrderEvent::ClosedForGood), ("order.reopened", 1, OrderEvent::Reopened {})]
    {
        let object = r#" { "why": [1, {"nested": null}] } "#;
        assert_eq!(OrderEvent::decode(name, version, object).unwrap(), Some(event));
        for other in ["null", "[]", "1", "\"\"", "", "{}{}"] {
            undecodable::<OrderEvent>(name, version, other);
        }
    }
}

#[test]
fn an_unknown_type_fails() {
    let error = OrderEvent::decode("order.cancelled", 1, "{}").unwrap_err();
    let expected = OrderEvent::TYPES;
    assert_eq!(error, EventError::UnknownType { type_name: "order.cancelled".to_owned(), expected });
    // If a variant has an explicit name, the name of the variant itself is not a stored name.
    assert!(OrderEvent::decode("order.confirmed", 1, r#"{"order_id":"o-1"}"#).is_err());
}

#[test]
fn an_unknown_type_is_skipped_on_request() {
    #[derive(Event, Debug, PartialEq)]
    #[event(prefix = "order", unknown = "skip")]
    enum Shipping {
        Placed { order_id: String },
    }
    // For an event that the enum does not know, neither the version nor the JSON matters.
    assert_eq!(Shipping::decode("order.cancelled", -7, "no json").unwrap(), None);
    // An event type that the enum knows must still be readable, whatever the enum skips.
    undecodable::<Shipping>("order.placed", 1, "{}");
    assert!(Shipping::decode("order.placed", 2, "{}").is_err());
}

#[test]
fn unknown_versions_fail() {
    for (name, known, versions) in [
        ("order.placed", 3, [4, 0, -1, i32::MAX, i32::MIN]),
        ("order.closed-for-good", 2, [3, 0, -1, i32::MAX, i32::MIN]),
    ] {
        for version in versions {
            let type_name = name.to_owned();
            assert_eq!(
                OrderEvent::decode(name, version, "{}").unwrap_err(),
                EventError::FutureVersion { type_name, version, known }
            );
        }
    }
}

#[derive(Event, Debug, PartialEq)]
enum Serde {
    Fields {
        #[serde(rename = "orderId", alias = "order")]
        id: String,
        #[serde(default)]
        tags: Vec<String>,
        #[serde(default = "one", skip_serializing_if = "is_default")]
        count: u8,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<String>,
        #[serde(with = "hex")]
        code: u32,
        #[serde(skip)]
        cached: Option<u8>,
        #[serde(flatten)]
        rest: BTreeMap<String, u8>,
    },
    #[serde(rename_all = "camelCase")]
    Camel {
        order_id: String,
    },
    Wrapped(#[serde(with = "hex")] u32),
}

fn one() -> u8 {
    1
}

/// The function is generic on purpose: it must receive a reference to the field, not a reference to a reference.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<T: std::fmt::LowerHex, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{value:x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
        u32::from_str_radix(&String::deserialize(from)?, 16).map_err(D::Error::custom)
    }
}

#[test]
fn serde_attributes_of_fields_are_kept() {
    let full = Serde::Fields {
        id: "o-1".to_owned(),
        tags: vec!["gift".to_owned()],
        count: 2,
        note: Some("ring twice".to_owned()),
        code: 255,
        cached: None,
        rest: BTreeMap::from([("extra".to_owned(), 9)]),
    };
    let json = r#"{"orderId":"o-1","tags":["gift"],"count":2,"note":"ring twice","code":"ff","extra":9}"#;
    stores(&full, "fields", 1, json);

    let sparse = |count| Serde::Fields {
        id: "o-1".to_owned(),
        tags: vec![],
        count,
        note: None,
        code: 16,
        cached: None,
        rest: BTreeMap::new(),
    };
    let read = Serde::decode("fields", 1, r#"{"order":"o-1","code":"10"}"#).unwrap();
    assert_eq!(read, Some(sparse(1)));
    assert_eq!(sparse(0).encode().unwrap(), r#"{"orderId":"o-1","tags":[],"code":"10"}"#);

    stores(&Serde::Camel { order_id: "o-1".to_owned() }, "camel", 1, r#"{"orderId":"o-1"}"#);
    stores(&Serde::Wrapped(255), "wrapped", 1, r#""ff""#);
}

#[test]
fn a_skipped_field_is_neither_written_nor_read() {
    let with_cache = Serde::Fields {
        id: "o-1".to_owned(),
        tags: vec![],
        count: 0,
        note: None,
        code: 1,
        cached: Some(3),
        rest: BTreeMap::new(),
    };
    let json = with_cache.encode().unwrap();
    assert_eq!(json, r#"{"orderId":"o-1","tags":[],"code":"1"}"#);
    match Serde::decode("fields", 1, &json).unwrap() {
        Some(Serde::Fields { cached: None, .. }) => {}
        other => panic!("expected an empty cache, got {other:?}"),
    }
}

#[test]
fn encoding_borrows_its_fields() {
    /// A type that implements neither `Clone` nor `Copy`.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Unique(String);

    #[derive(Event, Debug, PartialEq)]
    enum Owned {
        Held { unique: Unique },
        Wrapped(Unique),
    }
    stores(&Owned::Held { unique: Unique("x".to_owned()) }, "held", 1, r#"{"unique":"x"}"#);
    stores(&Owned::Wrapped(Unique("x".to_owned())), "wrapped", 1, r#""x""#);
}

#[test]
fn value_without_a_json_form_is_unencodable() {
    #[derive(Event, Debug)]
    enum Odd {
        Keys { map: HashMap<(u8, u8), u8> },
    }
    let odd = Odd::Keys { map: HashMap::from([((1, 2), 3)]) };
    match odd.encode().unwrap_err() {
        EventError::Unencodable { type_name, reason } => {
            assert_eq!((type_name.as_str(), reason.as_str()), ("keys", "key must be a string"));
        }
        other => panic!("expected Unencodable, got {other:?}"),
    }
}

#[test]
fn empty_enum_knows_no_type() {
    #[derive(Event, Debug)]
    enum Never {}
    assert!(Never::TYPES.is_empty());
    let error = Never::decode("a", 1, "{}").unwrap_err();
    assert_eq!(error, EventError::UnknownType { type_name: "a".to_owned(), expected: &[] });
}

/// The generated code must not use names from the surrounding module.
mod shadowed {
    #![allow(dead_code, clippy::upper_case_acronyms)]

    pub struct Result;
    pub struct Option;
    pub struct String;
    pub struct Value;
    pub struct Map;
    pub trait ToString {}
    pub mod serde {}
    pub mod std {}

    #[derive(annals::Event, Debug, PartialEq)]
    #[event(prefix = "shadowed")]
    pub enum Shadowed {
        #[event(version = 2, upcasters(same))]
        Seen {
            type_name: u8,
            data: u8,
            schema_version: u8,
        },
        TYPES,
    }

    fn same(old: serde_json::Value) -> ::std::result::Result<serde_json::Value, &'static str> {
        Ok(old)
    }
}

#[test]
fn derive_ignores_names_in_scope() {
    use shadowed::Shadowed;
    let seen = Shadowed::Seen { type_name: 1, data: 2, schema_version: 3 };
    let json = r#"{"type_name":1,"data":2,"schema_version":3}"#;
    stores(&seen, "shadowed.seen", 2, json);
    assert_eq!(Shadowed::decode("shadowed.seen", 1, json).unwrap(), Some(seen));
    stores(&Shadowed::TYPES, "shadowed.types", 1, "{}");
}
